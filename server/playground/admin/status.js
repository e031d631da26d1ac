/* The state of the server's processes and workers, in short. */

import { tableOf } from "../bundle/charts.js";
import { element, replace } from "../dom.js";
import { refusal } from "../refusal.js";

/** { node, show(), clear() }. */
export function statusCard(api) {
  const place = element("div", { class: "stack" });
  const button = element("button", { type: "button", class: "small" }, "Look again");
  const node = element("section", { class: "card" }, element("header", {}, element("h2", {}, "Status"), button), place);

  let asked = 0;

  async function show() {
    const now = ++asked;
    button.disabled = true;
    let nodes;
    try {
      nodes = statusNodes(await api.get("v1/steering/status"));
    } catch (error) {
      nodes = refusal(api, error);
    }
    if (now === asked) {
      replace(place, nodes);
      button.disabled = false;
    }
  }

  function clear() {
    asked += 1;
    replace(place);
    button.disabled = false;
  }

  button.addEventListener("click", show);
  return { node, show, clear };
}

function statusNodes(status) {
  const { is_ready: isReady, generation_desired: desired, generation_observed: observed, members, workers } = status;
  const badge = isReady
    ? element("span", { class: "badge good" }, "ready")
    : element("span", { class: "badge warn" }, "not ready");
  const isBehind = observed !== desired;
  return [
    element(
      "p",
      {},
      badge,
      ` Requests see change ${observed} of ${desired}${isBehind ? "; a change is on its way" : ", the newest"}.`,
    ),
    tableOf(
      {
        columns: ["Worker", "Programs", "Rows used", "of", "Slots used", "of", "Requests", "Kernels"],
        rows: workers.map((worker) => [
          `replica ${worker.replica}, rank ${worker.rank}`,
          String(worker.bundles.length),
          String(worker.rows_used),
          String(worker.rows_total),
          String(worker.slots_used),
          String(worker.slots_total),
          String(worker.requests),
          worker.backend,
        ]),
      },
      "Workers",
    ),
    tableOf(
      {
        columns: ["API process", "State", "Sees change", "Problem"],
        rows: members.map((member) => [member.member, member.state, String(member.observed), member.problem ?? "none"]),
      },
      "API processes",
    ),
    status.declaration ? declarationNodes(status.declaration) : null,
  ];
}

/** The file that says which profiles there shall be, where the server was started with one. */
function declarationNodes({ file, is_applied: isApplied, problems }) {
  const rows = Object.entries(problems);
  return [
    element(
      "p",
      {},
      isApplied ? "All profiles are as " : "Not all profiles are yet as ",
      element("code", {}, file),
      " declares them.",
    ),
    rows.length > 0 ? tableOf({ columns: ["Profile", "Problem"], rows }, "Problems with what the file declares") : null,
  ];
}
