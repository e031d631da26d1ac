/* The question before something is deleted. */

import { asked } from "../dialog.js";
import { element, field } from "../dom.js";

const TIMEOUT_S = 30;
const MAX_TIMEOUT_S = 3600;

/** { drain, timeoutS }, or null when the user thought better of it. */
export async function askForDeletion({ title, text, action }) {
  const drain = element("input", { type: "checkbox", name: "drain", checked: true });
  const timeout = element("input", {
    type: "number",
    name: "timeout",
    min: "0",
    max: String(MAX_TIMEOUT_S),
    step: "any",
    required: true,
    value: String(TIMEOUT_S),
  });
  const form = await asked({
    title,
    fields: [
      element("p", {}, text),
      element("label", { class: "check" }, drain, "Wait until running requests that use it have ended"),
      field("Longest time to wait, in seconds", timeout),
    ],
    action,
    isDangerous: true,
  });
  return form === null ? null : { drain: drain.checked, timeoutS: timeout.valueAsNumber };
}

export function deletionPath(path, { drain, timeoutS }) {
  return `${path}?drain=${drain}&timeout_s=${timeoutS}`;
}
