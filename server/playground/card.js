/* A card that shows one answer: text with marked words, how fast it came, receipt or error. */

import { element, replace } from "./dom.js";
import { countText, durationText, rateText } from "./numbers.js";
import { receiptView } from "./receipt.js";

const SLOW_MS = 8000;
const STATES = {
  queued: "Queued",
  waiting: "Waiting",
  writing: "Writing",
  stopped: "Stopped",
  failed: "Failed",
};
const BADGES = { failed: "badge bad", stopped: "badge warn" };

/**
 * @param {object} options
 *   title: heading, text or nodes.
 *   kind: "plain" or "steered", which chooses the colour.
 *   empty: what to show before the first answer.
 *   tools: further buttons of the card's head.
 *   isFolded: whether receipts are folded.
 * Returns { node, show(answer, pieces), clear(), remedy }: `pieces` are those of words.js, null leaves the text
 * unmarked; `remedy` may be set to a function that gives a button for an error.
 */
export function answerCard({ title, kind, empty, tools = [], isFolded = false }) {
  const badge = element("span", { class: "badge", hidden: true });
  const text = element("div", { class: "answer-text", dir: "auto", "aria-live": "polite" });
  const thoughts = element("p", { dir: "auto" });
  const reasoning = element(
    "details",
    { class: "reasoning", hidden: true },
    element("summary", {}, "Reasoning"),
    thoughts,
  );
  const figures = element("p", { class: "figures" });
  const receipts = element("div", { class: "receipts" });
  const problem = element("div", { class: "problem" });
  const node = element(
    "article",
    { class: `card answer ${kind}` },
    element("header", {}, element("h3", {}, title), element("div", { class: "actions" }, badge, tools)),
    reasoning,
    text,
    problem,
    figures,
    receipts,
  );
  let shownReceipts = null;
  let shownError = null;
  let shownBody = [];
  const card = { node, show, clear, remedy: () => null };

  function show(answer, pieces = null) {
    badge.hidden = answer.state === "done";
    badge.className = BADGES[answer.state] ?? "badge";
    badge.textContent = answer.state === "waiting" ? waitText(answer) : STATES[answer.state];
    text.setAttribute("aria-busy", String(!answer.isOver));
    node.dataset.state = answer.state;
    reasoning.hidden = answer.reasoning === "";
    thoughts.textContent = answer.reasoning;
    const newBody = answer.text === "" ? [silence(answer)] : [answer.text, pieces];
    if (newBody.some((part, index) => part !== shownBody[index])) {
      // Not anew for each frame: somebody may be about to copy a part of it.
      shownBody = newBody;
      replace(text, body(answer, pieces, kind));
    }
    figures.textContent = figuresText(answer);
    if (shownReceipts !== answer.receipts) {
      // Not anew for each frame: somebody may be about to press a button of it.
      shownReceipts = answer.receipts;
      replace(
        receipts,
        shownReceipts.map((receipt) => receiptView(receipt, isFolded)),
      );
    }
    if (shownError !== answer.error) {
      shownError = answer.error;
      replace(problem, shownError === null ? null : errorView(shownError, card.remedy(shownError)));
    }
  }

  function clear() {
    badge.hidden = true;
    delete node.dataset.state;
    text.removeAttribute("aria-busy");
    reasoning.hidden = true;
    replace(text, empty);
    figures.textContent = "";
    shownReceipts = null;
    shownError = null;
    shownBody = [];
    replace(receipts);
    replace(problem);
  }

  clear();
  return card;
}

/** Text of an answer; marked words are `del` or `ins`, which screen readers announce. */
function body(answer, pieces, kind) {
  if (answer.text === "") {
    return element("p", { class: "muted" }, silence(answer));
  }
  const tag = kind === "plain" ? "del" : "ins";
  const parts = pieces ?? [{ text: answer.text, isMarked: false }];
  return parts.map(({ text, isMarked }) => (isMarked ? element(tag, {}, text) : text));
}

function silence(answer) {
  if (answer.state === "waiting") {
    const isSlow = answer.waitedMs > SLOW_MS;
    return isSlow
      ? "No word yet. The server may be busy or still loading; Stop ends the wait."
      : "Waiting for the first word \u2026";
  }
  if (answer.state === "queued") {
    return "Starts when another one ends.";
  }
  return answer.state === "done" ? "The answer is empty." : "No text came.";
}

function figuresText(answer) {
  const parts = [];
  if (answer.numTokens > 0) {
    parts.push(countText(answer.numTokens, "token"));
  }
  if (answer.tokensPerS !== null) {
    parts.push(`${rateText(answer.tokensPerS)} tokens/s`);
  }
  if (answer.firstTokenMs !== null) {
    parts.push(`first after ${durationText(answer.firstTokenMs)}`);
  }
  if (answer.finishReason === "length") {
    parts.push("cut at max tokens");
  }
  return parts.join(" \u00b7 ");
}

function waitText(answer) {
  const waitedS = Math.floor(answer.waitedMs / 1000);
  return waitedS === 0 ? STATES.waiting : `${STATES.waiting} ${waitedS} s`;
}

/** What the server said, its code, and a button that may help. */
export function errorView(error, remedy) {
  const wait = error.retryAfterS === null ? "" : ` Try again in ${Math.ceil(error.retryAfterS)} s.`;
  return element(
    "div",
    { class: "notice bad", role: "alert" },
    element("p", {}, error.message, wait, " ", element("code", {}, error.code)),
    remedy,
  );
}
