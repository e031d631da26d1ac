/* What the server refused, as it said it, with what can be done about it here. */

import { element } from "./dom.js";
import { askForKey } from "./key.js";
import { prose } from "./prose.js";

const ENABLE =
  "Start the server with the environment variable `EXPERTSTEER_ADMIN_KEY`, or with `--steering-keys FILE` and a key of " +
  "`expertsteer key new --role write`.";
const HINTS = {
  steering_admin_disabled: ENABLE,
  unreachable: "Nothing is known about what the server did with it; look at the history before you try again.",
};

/** Whether another key may help. */
export function needsKey(error) {
  return error.status === 401 || error.code === "steering_access_denied";
}

/** A notice; `retry` is what a button does, null for none. */
export function refusal(api, error, { title = null, retry = null } = {}) {
  const hint = HINTS[error.code] ?? null;
  return element(
    "div",
    { class: "notice bad", role: "alert" },
    element(
      "div",
      { class: "stack tight" },
      title === null ? null : element("strong", {}, title),
      element("p", {}, error.message),
      hint === null ? null : element("p", { class: "hint" }, prose(hint)),
      element("p", { class: "hint" }, element("code", {}, error.code ?? error.name), statusOf(error)),
    ),
    element(
      "div",
      { class: "actions" },
      needsKey(error) ? keyButton(api, error) : null,
      retry === null ? null : element("button", { type: "button", onclick: retry }, "Try again"),
    ),
  );
}

/** As `refusal`, but a stop of the user's own is none: it says what is known of it. */
export function stoppedOrRefused(api, error, options) {
  return error.name === "AbortError"
    ? element("p", { class: "notice", role: "status" }, error.message)
    : refusal(api, error, options);
}

/** What to show in the place of things that only a key opens, before there was any. */
export function keyNeeded(api, error, title) {
  return element(
    "div",
    { class: "empty" },
    element("h2", {}, title),
    element("p", {}, "A key of the role read or write opens this. It stays in the memory of this page."),
    keyButton(api, error, "primary"),
  );
}

function keyButton(api, error, className = null) {
  const ask = () => askForKey(api, error.message);
  return element("button", { type: "button", class: className, onclick: ask }, "Use a key");
}

function statusOf(error) {
  return error.status > 0 ? `, HTTP status ${error.status}` : null;
}
