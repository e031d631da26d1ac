/* The form of a request: prompt, system prompt and sampling. Both views show the same draft. */

import { element, field } from "./dom.js";

/** Returns { node, show(), check() }: `show` reads the draft anew, `check` says whether it is valid, and why not. */
export function requestForm(draft, onRun) {
  const prompt = element("textarea", { rows: "3", required: true, dir: "auto", "aria-keyshortcuts": "Control+Enter" });
  const system = element("textarea", { rows: "2", dir: "auto" });
  const temperature = element("input", { type: "number", min: "0", max: "2", step: "any", required: true });
  const maxTokens = element("input", { type: "number", min: "1", step: "1", required: true });
  const seed = element("input", { type: "number", step: "1", placeholder: "none" });
  const isPlain = element("input", { type: "checkbox" });
  const systemField = field("System prompt", system);
  const more = element(
    "details",
    {},
    element("summary", {}, "Settings"),
    element(
      "div",
      { class: "stack settings" },
      systemField,
      element(
        "div",
        { class: "fields" },
        field("Temperature", temperature),
        field("Max tokens", maxTokens),
        field("Seed", seed),
      ),
      element("label", { class: "check" }, isPlain, "Plain completion, without the chat template"),
    ),
  );
  const node = element("div", { class: "stack" }, field("Prompt", prompt, "Ctrl + Enter runs it."), more);

  function show() {
    prompt.value = draft.prompt;
    system.value = draft.system;
    temperature.value = String(draft.temperature);
    maxTokens.value = String(draft.maxTokens);
    seed.value = draft.seed === null ? "" : String(draft.seed);
    isPlain.checked = draft.isPlain;
    systemField.hidden = draft.isPlain;
  }

  function check() {
    const invalid = [prompt, temperature, maxTokens, seed].find((control) => !control.validity.valid);
    if (invalid !== undefined) {
      more.open ||= invalid !== prompt;
      invalid.reportValidity();
    }
    return invalid === undefined;
  }

  node.addEventListener("input", () => {
    draft.prompt = prompt.value.toWellFormed();
    draft.system = system.value.toWellFormed();
    draft.temperature = temperature.valueAsNumber;
    draft.maxTokens = maxTokens.valueAsNumber;
    draft.seed = seed.value === "" ? null : seed.valueAsNumber;
    draft.isPlain = isPlain.checked;
    systemField.hidden = draft.isPlain;
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      onRun();
    }
  });
  show();
  return { node, show, check };
}
