/* The versions of a profile: who made them, when, and a way back to each. */

import { element, replace } from "../dom.js";
import { figure, time } from "../format.js";
import { shortDigest } from "../numbers.js";

const ACTIONS = { put: "set", rollback: "rolled back", delete: "deleted", seed: "set at the server's start" };

/** A table; `more(before)` gives { history, next } of older versions, `restore(version)` is what the buttons do. */
export function historyTable({ name, generation, history, next }, { more, restore }) {
  const body = element("tbody", {});
  const button = element("button", { type: "button", class: "small" }, "Older versions");
  const message = element("p", { class: "hint", role: "status", hidden: true });
  let before = next;

  function add(versions) {
    body.append(...versions.map((version) => rowOf(version, generation, restore)));
    button.hidden = before === null;
  }

  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const page = await more(before);
      before = page.next;
      add(page.history);
      message.hidden = true;
    } catch (error) {
      message.hidden = false;
      replace(message, error.message);
    } finally {
      button.disabled = false;
    }
  });
  add(history);
  return element(
    "div",
    { class: "stack" },
    element(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": `History of ${name}` },
      element(
        "table",
        { class: "sheet" },
        element("caption", { class: "unseen" }, `History of ${name}, newest first`),
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            ["Version", "What", "Bundle", "Strength", "Who", "When"].map((text) =>
              element("th", { scope: "col" }, text),
            ),
            element("th", { scope: "col" }, element("span", { class: "unseen" }, "Way back")),
          ),
        ),
        body,
      ),
    ),
    button,
    message,
  );
}

function rowOf(version, generation, restore) {
  const { settings } = version;
  const isCurrent = version.generation === generation;
  const wayBack = isCurrent
    ? element("span", { class: "badge good" }, "current")
    : settings === null
      ? null
      : element(
          "button",
          {
            type: "button",
            class: "small",
            "aria-label": `Roll back to version ${version.generation}`,
            onclick: () => restore(version),
          },
          "Roll back",
        );
  return element(
    "tr",
    { "aria-current": isCurrent ? "true" : null },
    element("td", {}, String(version.generation)),
    element("td", { class: "what" }, actionText(version)),
    element("td", {}, settings === null ? null : element("code", {}, shortDigest(settings.bundle))),
    element(
      "td",
      {},
      settings === null ? null : `${figure(settings.strength)} of ${figure(settings.maximum_strength)}`,
    ),
    element("td", {}, version.actor),
    element("td", {}, time(version.at)),
    element("td", { class: "act" }, wayBack),
  );
}

function actionText({ action, restored_from: from }) {
  return (ACTIONS[action] ?? action) + (from === null ? "" : ` to version ${from}`);
}
