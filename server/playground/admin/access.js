/* The key: asked for, used, forgotten. It is in the memory of this page and nowhere else. */

import { element, field, replace } from "../dom.js";
import { keyInput } from "../key.js";

const KEPT = "Kept in the memory of this page until you reload or forget it; it is sent to this server only.";

/** { node, show(refusal) }: `refusal` is what the server says about the present key, null when it is good. */
export function accessCard(api) {
  const message = element("div", {});
  const body = element("div", {});
  const said = element("p", { class: "unseen", role: "status" });
  const node = element("section", { class: "card" }, element("h2", {}, "Access"), message, body, said);
  let isAsking = false;

  function show(refused) {
    replace(message, refused);
    // What is being typed stays, whatever the server says meanwhile.
    if (api.hasKey || !isAsking) {
      const hadFocus = body.contains(document.activeElement);
      replace(body, api.hasKey ? inUse(refused === null) : ask());
      said.textContent = "";
      if (hadFocus) {
        // The button that was pressed is gone.
        body.querySelector("button").focus();
        said.textContent = !api.hasKey ? "The key is forgotten." : refused === null ? "The key is in use." : "";
      }
    }
    isAsking = !api.hasKey;
  }

  function ask() {
    const input = keyInput();
    const form = element(
      "form",
      { class: "stack key" },
      field("Admin key", input, `A key of the role write; the role read suffices to look. ${KEPT}`),
      element("div", { class: "actions" }, element("button", { type: "submit", class: "primary" }, "Use key")),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const key = input.value.trim();
      input.value = "";
      api.setKey(key);
    });
    return form;
  }

  function inUse(isGood) {
    return element(
      "div",
      { class: "actions between" },
      element(
        "p",
        {},
        isGood ? "A key is in use. " : "The key in use does not open this. ",
        element("span", { class: "hint" }, KEPT),
      ),
      element("button", { type: "button", onclick: () => api.setKey(null) }, "Forget the key"),
    );
  }

  return { node, show };
}
