/* Dialogs: they keep the focus inside, close on Escape, and give the focus back.
 *
 *   if (await confirmed({ title: "Delete careful?", text: "Requests that run go on.", action: "Delete" })) ...
 *   const form = await asked({ title, fields: [node, ...], action })     the form; null when it was cancelled
 */

import { element, freshId } from "./dom.js";

export async function confirmed({ title, text, action, isDangerous = true }) {
  return (await asked({ title, fields: [element("p", {}, text)], action, isDangerous })) !== null;
}

export function asked({ title, fields, action, isDangerous = false }) {
  const id = freshId("dialog");
  const form = element(
    "form",
    { method: "dialog" },
    element("h2", { id }, title),
    fields,
    element(
      "div",
      { class: "actions" },
      element("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Cancel"),
      element("button", { type: "submit", value: "done", class: isDangerous ? "danger" : "primary" }, action),
    ),
  );
  const dialog = element("dialog", { "aria-labelledby": id }, form);
  document.body.append(dialog);
  return new Promise((resolve) => {
    let isDone = false;
    form.addEventListener("submit", (event) => {
      // The policy allows no form to be sent anywhere; closing is all that it has to do.
      event.preventDefault();
      isDone = true;
      dialog.close();
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(isDone ? form : null);
    });
    dialog.showModal();
  });
}
