/* Asking for a key. It stays in the memory of this page: no storage, no cookie, no address. */

import { asked } from "./dialog.js";
import { element, field } from "./dom.js";

/** A field for a key; it is not valid with characters that no header can carry. */
export function keyInput(attributes = {}) {
  const input = element("input", {
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    ...attributes,
  });
  input.addEventListener("input", () => input.setCustomValidity(problemOf(input.value.trim())));
  return input;
}

/** What is wrong with a key; empty where nothing is. */
function problemOf(key) {
  const found = [...key].find((character) => !/[\t\x20-\x7e\x80-\xff]/.test(character));
  if (found === undefined) {
    return "";
  }
  const number = found.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return `A key cannot have the character U+${number}; copy the key again.`;
}

/** Ask for a key and give it to `api`; false when nobody gave one. `reason` says what it is needed for. */
export async function askForKey(api, reason) {
  const input = keyInput({ name: "key", autofocus: true });
  const hint = "Kept in the memory of this page until you reload or forget it; it is sent to this server only.";
  const form = await asked({
    title: "Use a key",
    fields: [element("p", {}, reason), field("API key", input, hint)],
    action: "Use key",
  });
  const key = input.value.trim();
  input.value = "";
  if (form === null || key === "") {
    return false;
  }
  api.setKey(key);
  return true;
}
