/* The tab Compare: the default and the steered answer to one prompt, side by side. */

import { Answer } from "./answer.js";
import { answerCard } from "./card.js";
import { showCode } from "./code.js";
import { element, replace, showResults } from "./dom.js";
import { requestForm } from "./form.js";
import { countText } from "./numbers.js";
import { profilePicker } from "./profiles.js";
import { remedyOf } from "./remedies.js";
import { bodyOf, pathOf, streamed } from "./request.js";
import { runButton } from "./run_button.js";
import { Runner } from "./runner.js";
import { Comparison } from "./words.js";

export function mount(root, api, state) {
  const { draft } = state;
  const runner = new Runner(draw);
  const form = requestForm(draft, run);
  const picker = profilePicker(state, api);
  const { node: button, draw: drawButton } = runButton(runner);
  const summary = element("p", { class: "summary", role: "status" });
  const plain = answerCard({
    title: "Default",
    kind: "plain",
    empty: element("p", { class: "muted" }, "What the model says by itself."),
    tools: [element("button", { type: "button", class: "quiet small", onclick: () => code([]) }, "Code")],
  });
  const steered = answerCard({
    title: "Steered",
    kind: "steered",
    empty: element("p", { class: "muted" }, "What it says with the chosen profiles, word differences marked."),
    tools: [element("button", { type: "button", class: "quiet small", onclick: () => code(picker.chosen()) }, "Code")],
  });
  let answers = null;
  let comparison = null;

  async function run() {
    if (runner.isRunning || state.model === null || !form.check() || !picker.check()) {
      return;
    }
    const { model } = state;
    const steering = picker.chosen();
    const answer = () => new Answer(() => runner.changed());
    answers = { plain: answer(), steered: steering.length === 0 ? null : answer() };
    comparison = new Comparison();
    showResults(results);
    const jobs = [job(answers.plain, model, []), ...(answers.steered ? [job(answers.steered, model, steering)] : [])];
    await runner.run(jobs, jobs.length);
    if ([answers.plain, answers.steered].some((each) => each?.error?.status === 404)) {
      // A profile went meanwhile, or the model did.
      await state.refresh();
    }
  }

  async function rerun() {
    await runner.stop();
    await run();
  }

  function job(answer, model, steering) {
    const [path, body] = [pathOf(draft), streamed(bodyOf(draft, model, steering))];
    return (signal) => answer.run(api, path, body, signal);
  }

  function code(steering) {
    if (form.check() && picker.check()) {
      showCode(api, pathOf(draft), bodyOf(draft, state.model, steering));
    }
  }

  function draw() {
    if (root.hidden || answers === null) {
      return;
    }
    drawButton();
    const { plain: first, steered: second } = answers;
    const isFinal = first.isOver && (second?.isOver ?? true);
    const difference = second === null ? null : comparison.of(first.text, second.text, isFinal);
    plain.show(first, difference?.first);
    if (second === null) {
      steered.clear();
    } else {
      steered.show(second, difference?.second);
    }
    summary.textContent = isFinal ? summaryText(difference) : "";
    legend.hidden = difference === null;
    root.dataset.state = runner.isRunning ? "running" : "idle";
  }

  const request = element(
    "form",
    { class: "card request", novalidate: true, "aria-label": "Request" },
    form.node,
    picker.node,
    element("div", { class: "actions" }, button),
  );
  request.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  const enable = () => {
    button.disabled = state.model === null;
  };
  state.addEventListener("change", enable);
  enable();
  for (const card of [plain, steered]) {
    card.remedy = (error) => remedyOf(error, { api, draft, form, rerun });
  }
  const legend = element(
    "p",
    { class: "legend", "aria-hidden": "true", hidden: true },
    element("span", {}, element("del", {}, "dashed"), " only in the default answer"),
    element("span", {}, element("ins", {}, "solid"), " only in the steered answer"),
  );
  const results = element(
    "div",
    { class: "stack results" },
    element("div", { class: "pair" }, plain.node, steered.node),
    element("div", { class: "below" }, summary, legend),
  );
  replace(
    root,
    element("h2", { class: "unseen" }, "Compare the default and the steered answer"),
    element("div", { class: "bench" }, request, results),
  );
  return {
    show() {
      form.show();
      draw();
      state.refresh();
    },
  };
}

function summaryText(difference) {
  if (difference === null) {
    return "";
  }
  const { numFirst, numSecond } = difference;
  if (numFirst + numSecond === 0) {
    return "Both answers have the same words.";
  }
  return `${countText(numFirst, "word")} only in the default answer, ${numSecond} only in the steered one.`;
}
