/* A dialog that shows a request as code. */

import { copyButton } from "./clipboard.js";
import { curlText, pythonText } from "./copy.js";
import { element, freshId } from "./dom.js";

/** Show the request `body` to `path` for curl and for Python. */
export function showCode(api, path, body) {
  const id = freshId("code");
  const texts = {
    curl: curlText(api.url(path), body, api.hasKey),
    Python: pythonText(api.url("v1"), body, api.hasKey),
  };
  const shown = element("pre", { class: "code", tabindex: "0", "aria-live": "polite" });
  const choices = Object.keys(texts).map((name) =>
    element("button", { type: "button", class: "small", onclick: () => show(name) }, name),
  );
  let current = "curl";

  function show(name) {
    current = name;
    shown.textContent = texts[name];
    shown.setAttribute("aria-label", `The request for ${name}`);
    for (const choice of choices) {
      choice.setAttribute("aria-pressed", String(choice.textContent === name));
    }
  }

  const hint = api.hasKey
    ? "Takes the key from the environment variable EXPERTSTEER_API_KEY; the one of this page is not in it."
    : "The same request; the answer comes in one piece.";
  const dialog = element(
    "dialog",
    { class: "wide", "aria-labelledby": id },
    element(
      "div",
      { class: "stack" },
      element(
        "header",
        { class: "dialog-head" },
        element("h2", { id }, "This request as code"),
        element("div", { class: "actions", role: "group", "aria-label": "Language" }, choices),
      ),
      shown,
      element("p", { class: "hint" }, hint),
      element(
        "div",
        { class: "actions" },
        element("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close"),
        copyButton("Copy", () => texts[current], { classes: "primary" }),
      ),
    ),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  show(current);
  dialog.showModal();
}
