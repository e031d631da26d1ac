/* The newest lines of the audit log: every change that was made, or refused. */

import { element, replace } from "../dom.js";
import { NONE, time } from "../format.js";
import { shortDigest } from "../numbers.js";
import { refusal } from "../refusal.js";

const PAGE = 15;
const COLUMNS = ["When", "Who", "What", "Of", "Bundle", "Version", "Outcome"];

/** { node, show(), clear() }. */
export function auditCard(api) {
  const body = element("tbody", {});
  const message = element("div", {});
  const older = element("button", { type: "button", class: "small", hidden: true }, "Older lines");
  const table = element(
    "table",
    { class: "sheet" },
    element("caption", { class: "unseen" }, "Audit log, newest first"),
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        COLUMNS.map((text) => element("th", { scope: "col" }, text)),
      ),
    ),
    body,
  );
  const node = element(
    "section",
    { class: "card" },
    element("h2", {}, "Audit log"),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Audit log" }, table),
    message,
    element("div", {}, older),
  );
  let before = null;
  let asked = 0;

  async function load(isMore) {
    const now = ++asked;
    older.disabled = true;
    try {
      const page = await api.get(`v1/steering/audit?limit=${PAGE}${isMore ? `&before=${before}` : ""}`);
      if (now !== asked) {
        return;
      }
      before = page.next;
      const rows = page.entries.map(rowOf);
      replace(message);
      if (isMore) {
        body.append(...rows);
      } else {
        replace(body, rows);
      }
    } catch (error) {
      if (now !== asked) {
        return;
      }
      replace(message, refusal(api, error));
    }
    older.hidden = before === null;
    older.disabled = false;
  }

  function clear() {
    asked += 1;
    before = null;
    older.hidden = true;
    replace(body);
    replace(message);
  }

  older.addEventListener("click", () => load(true));
  return { node, show: () => load(false), clear };
}

function rowOf(entry) {
  const isOk = entry.outcome === "ok";
  const outcome = element("span", { class: isOk ? "badge good" : "badge bad" }, entry.outcome ?? NONE);
  return element(
    "tr",
    {},
    element("td", {}, time(entry.at)),
    element("td", {}, entry.actor ?? NONE),
    element("td", {}, entry.action ?? NONE),
    element("td", { class: "wide" }, entry.target ?? NONE),
    element("td", {}, entry.digest ? element("code", {}, shortDigest(entry.digest)) : NONE),
    element("td", {}, versionsOf(entry)),
    element("td", { class: "wide" }, outcome, entry.reason ? element("p", { class: "hint" }, entry.reason) : null),
  );
}

function versionsOf({ before, after }) {
  if (before === null && after === null) {
    return NONE;
  }
  return `${before ?? NONE} → ${after ?? NONE}`;
}
