/* Copying text, and saying that it worked. */

import { element } from "./dom.js";

const SHOWN_MS = 1600;

/** A button that copies what `text()` gives when it is pressed. */
export function copyButton(label, text, { name = null, classes = "small" } = {}) {
  const button = element("button", { type: "button", class: classes, "aria-label": name }, label);
  const said = element("span", { class: "unseen", role: "status" });
  button.addEventListener("click", async () => {
    const isCopied = await copy(text(), button);
    button.textContent = isCopied ? "Copied" : "Not copied";
    said.textContent = isCopied ? "Copied" : "The browser did not allow to copy; select the text instead.";
    setTimeout(() => {
      button.textContent = label;
      said.textContent = "";
    }, SHOWN_MS);
  });
  return [button, said];
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS browsers have no clipboard API, unless the page is on this machine.
    return copySelected(text, button);
  }
}

function copySelected(text, button) {
  const area = element("textarea", { class: "unseen", readonly: true, "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  // Inside the dialog, if there is one: what lies outside cannot be selected then.
  button.after(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  button.focus();
  return isCopied;
}
