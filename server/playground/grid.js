/* The tab Strengths: answers at several strengths of one profile, each compared with strength 0. */

import { Answer } from "./answer.js";
import { answerCard } from "./card.js";
import { showCode } from "./code.js";
import { element, field, replace, showResults } from "./dom.js";
import { requestForm } from "./form.js";
import { countText, strengthText } from "./numbers.js";
import { remedyOf } from "./remedies.js";
import { bodyOf, pathOf, SCOPES, streamed } from "./request.js";
import { runButton } from "./run_button.js";
import { Runner } from "./runner.js";
import { fill } from "./strength.js";
import { Comparison } from "./words.js";

// Browsers open six connections to a server; one stays free for everything else that the page asks.
const AT_ONCE = 5;
const MAX_STRENGTHS = 25;

export function mount(root, api, state) {
  const { draft } = state;
  const runner = new Runner(draw);
  const form = requestForm(draft, run);
  const select = element("select", { required: true });
  const scope = element(
    "select",
    {},
    Object.entries(SCOPES).map(([name, text]) => element("option", { value: name }, `${name} \u2013 ${text}`)),
  );
  const strengths = element("input", {
    type: "text",
    required: true,
    inputmode: "text",
    spellcheck: "false",
    autocomplete: "off",
  });
  const hint = element("span", {});
  const { node: button, draw: drawButton } = runButton(runner);
  const summary = element("p", { class: "summary muted", role: "status" });
  const grid = element("div", { class: "grid" });
  const choice = element(
    "fieldset",
    { class: "stack" },
    element("legend", { class: "unseen" }, "Profile and strengths"),
    field("Profile", select),
    field("Strengths", strengths, hint),
    field("Scope", scope),
  );
  // What the proposed strengths are for, and how they read.
  let proposed = { name: null, generation: null, text: null };
  let cells = [];

  function profile() {
    return state.profiles.find(({ name }) => name === select.value) ?? null;
  }

  /** Show the profiles that there are now. */
  function offer() {
    const kept = select.value;
    replace(
      select,
      state.profiles.map(({ name }) => element("option", { value: name, selected: name === kept }, name)),
    );
    choice.disabled = state.profiles.length === 0;
    button.disabled = profile() === null || state.model === null;
    propose();
    if (cells.length === 0) {
      replace(grid, emptyState(state));
    }
  }

  /** Propose strengths of another profile, or of another version where nobody has typed others. */
  function propose() {
    const now = profile();
    if (now === null) {
      return;
    }
    const { name, generation, maximum_strength: limit } = now;
    const isUntouched = generation !== proposed.generation && strengths.value === proposed.text;
    if (name !== proposed.name || isUntouched) {
      strengths.value = proposal(now).join("  ");
      scope.value = now.scope;
      proposed = { name, generation, text: strengths.value };
    }
    hint.textContent = `From ${strengthText(-limit)} to ${strengthText(limit)}, spaces between; 0 is always there.`;
    check();
  }

  /** The strengths asked for, in order; null when the field has none that can be asked. */
  function check() {
    const { values, problem } = parsed(strengths.value, profile());
    strengths.setCustomValidity(problem ?? "");
    return problem === null ? values : null;
  }

  async function run() {
    const values = check();
    if (runner.isRunning || button.disabled || !form.check() || !strengths.reportValidity()) {
      return;
    }
    const { model } = state;
    const { name, maximum_strength: maximum } = profile();
    const path = pathOf(draft);
    cells = values.map((strength) => {
      const body = bodyOf(draft, model, [{ name, strength, scope: scope.value }]);
      return newCell({ strength, maximum, path, body });
    });
    replace(
      grid,
      cells.map((cell) => cell.card.node),
    );
    showResults(grid);
    // What all are compared with comes first.
    const ordered = [cells.find(isZero), ...cells.filter((cell) => !isZero(cell))];
    const jobs = ordered.map(
      ({ answer, body }) =>
        (signal) =>
          answer.run(api, path, streamed(body), signal),
    );
    await runner.run(jobs, AT_ONCE);
    if (cells.some(({ answer }) => answer.error?.status === 404)) {
      await state.refresh();
    }
  }

  async function rerun() {
    await runner.stop();
    await run();
  }

  /** `path` and `body` are what is asked, whatever becomes of the form. */
  function newCell({ strength, maximum, path, body }) {
    const note = element("p", { class: "note" });
    const bar = element("span", { class: "level-bar" });
    fill(bar, strength, maximum);
    const card = answerCard({
      title: element("span", { class: "level" }, strengthText(strength)),
      kind: strength === 0 ? "plain" : "steered",
      empty: null,
      isFolded: true,
      tools: [
        element(
          "button",
          {
            type: "button",
            class: "quiet small",
            "aria-label": `Code for strength ${strengthText(strength)}`,
            onclick: () => showCode(api, path, body),
          },
          "Code",
        ),
      ],
    });
    card.remedy = (error) => remedyOf(error, { api, draft, form, rerun });
    card.node.querySelector("header").after(bar, note);
    return { strength, body, note, card, comparison: new Comparison(), answer: new Answer(() => runner.changed()) };
  }

  function draw() {
    if (root.hidden || cells.length === 0) {
      return;
    }
    drawButton();
    const zero = cells.find(isZero).answer;
    for (const { strength, answer, card, note, comparison } of cells) {
      const isFinal = zero.isOver && answer.isOver;
      const difference = strength === 0 ? null : comparison.of(zero.text, answer.text, isFinal);
      card.show(answer, difference?.second);
      note.textContent = strength === 0 ? "off, for comparison" : isFinal ? noteText(difference) : "";
    }
    const isOver = cells.every(({ answer }) => answer.isOver);
    summary.textContent = isOver ? summaryText(cells) : "";
    root.dataset.state = runner.isRunning ? "running" : "idle";
  }

  select.addEventListener("change", propose);
  strengths.addEventListener("input", check);
  state.addEventListener("change", offer);
  const request = element(
    "form",
    { class: "card request", novalidate: true, "aria-label": "Request at several strengths" },
    form.node,
    choice,
    element("div", { class: "actions" }, button),
  );
  request.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  replace(
    root,
    element("h2", { class: "unseen" }, "Compare strengths of one profile"),
    element("div", { class: "bench" }, request, element("div", { class: "stack results" }, grid, summary)),
  );
  offer();
  return {
    show() {
      form.show();
      draw();
      state.refresh();
    },
  };
}

function isZero({ strength }) {
  return strength === 0;
}

/** Five short strengths from the negative bound to the bound, with the default for the one that is next to it. */
function proposal({ strength, maximum_strength: limit }) {
  const half = strength > 0 && strength < limit ? strength : limit / 2;
  // Rounded up, the bound would be refused.
  const rounded = (value) => Math.min(limit, Number(value.toPrecision(4)));
  return [-rounded(limit), -rounded(half), 0, rounded(half), rounded(limit)];
}

/** Strengths of a text, with 0, in order and each once; `problem` says what is wrong with it. */
export function parsed(text, profile) {
  const words = text
    .replaceAll("\u2212", "-")
    .split(/[\s,;]+/)
    .filter((word) => word !== "");
  const values = words.map(Number);
  const limit = profile?.maximum_strength ?? 0;
  const wrong = words.find((_, index) => !Number.isFinite(values[index]));
  const outside = values.find((value) => Math.abs(value) > limit);
  const all = [...new Set([...values.map((value) => value + 0), 0])].sort((one, two) => one - two);
  let problem = null;
  if (words.length === 0) {
    problem = "Give at least one strength.";
  } else if (wrong !== undefined) {
    problem = `'${wrong}' is no number.`;
  } else if (outside !== undefined) {
    problem = `${strengthText(outside)} is outside of ${strengthText(-limit)} to ${strengthText(limit)}.`;
  } else if (all.length > MAX_STRENGTHS) {
    problem = `${all.length} strengths; give at most ${MAX_STRENGTHS}.`;
  }
  return { values: all, problem };
}

function emptyState(state) {
  if (state.isLoaded && state.problem === null && state.profiles.length === 0) {
    return element(
      "div",
      { class: "empty" },
      element("h3", {}, "No profile yet"),
      element(
        "p",
        {},
        "Add one in the ",
        element("a", { href: "#admin" }, "Admin tab"),
        " to see what its strength does.",
      ),
    );
  }
  return element(
    "div",
    { class: "empty" },
    element("h3", {}, "One prompt, several strengths"),
    element("p", {}, "Run shows the answer at each strength, with the words marked that strength 0 does not have."),
  );
}

function noteText(difference) {
  if (difference === null) {
    return "";
  }
  const count = Math.max(difference.numFirst, difference.numSecond);
  return count === 0 ? "same words as off" : `${countText(count, "word")} differ${count === 1 ? "s" : ""} from off`;
}

function summaryText(cells) {
  const done = cells.filter(({ answer }) => answer.state === "done").length;
  return `${done} of ${cells.length} answers arrived.`;
}
