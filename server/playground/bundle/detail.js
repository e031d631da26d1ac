/* One bundle: who it is, who holds and uses it, where it acts, and how well that was measured. */

import { bundleActions } from "../admin/bundle_actions.js";
import { copyButton } from "../clipboard.js";
import { element, replace } from "../dom.js";
import { NONE, figure, listed, size, time } from "../format.js";
import { prose } from "../prose.js";
import { refusal } from "../refusal.js";
import { SCOPES } from "../request.js";
import { tableOf } from "./charts.js";
import { conditionsChart } from "./conditions.js";
import { doseChart } from "./dose.js";
import { chosenPairs, evidence } from "./evidence.js";
import { layersChart } from "./layers.js";
import { pairsChart } from "./pairs.js";

const MAX_RAW = 200_000;
const MAX_USES = 12;

/** Fill `place`; `isWanted()` says whether it still waits for this bundle, `onChange(text)` comes after a change. */
export async function showBundle(place, api, state, digest, { isWanted, retry, onChange }) {
  const path = `v1/steering/bundles/${digest}`;
  if (place.dataset.digest !== digest) {
    replace(place, element("p", { class: "muted", role: "status" }, "Loading the bundle …"));
  }
  try {
    const [bundle, manifest, tensors] = await Promise.all([
      api.get(path),
      api.get(`${path}/manifest`),
      // A damaged file does not hide what the registry knows.
      api.get(`${path}/tensors`).catch((error) => ({ rows: null, evidence: [], problem: error })),
    ]);
    if (isWanted()) {
      place.dataset.digest = digest;
      replace(place, cards({ api, state, bundle, manifest, tensors, onChange }));
    }
  } catch (error) {
    if (isWanted()) {
      delete place.dataset.digest;
      replace(place, refusal(api, error, { title: "The bundle cannot be shown.", retry }));
    }
  }
}

function cards({ api, state, bundle, manifest, tensors, onChange }) {
  return [
    identity(bundle, manifest, bundleActions(api, state, bundle, onChange)),
    tensors.problem ? refusal(api, tensors.problem, { title: "Its file cannot be read." }) : null,
    element("section", { class: "card" }, element("h3", {}, "Where it acts"), layersChart(manifest, tensors.rows)),
    pairing(manifest),
    evaluation(manifest),
    deployment(bundle),
    provenance(bundle, manifest, tensors),
  ];
}

function identity(bundle, manifest, actions) {
  const facts = [
    ["Licence", manifest.licence || "none is named"],
    ["Recommended strength", figure(manifest.recommended_strength)],
    ["Maximum strength", figure(manifest.maximum_strength)],
    ["Scope", scopeText(manifest)],
  ];
  const models = [
    ["Target", modelText(manifest.target)],
    ["Expert", manifest.expert === null ? "none is named" : modelText(manifest.expert)],
  ];
  return element(
    "section",
    { class: "card" },
    element("header", {}, element("h2", {}, bundle.name), element("span", { class: "muted" }, size(bundle.num_bytes))),
    element("p", {}, bundle.description || "The bundle comes without a description."),
    element(
      "div",
      { class: "digest" },
      element("code", {}, bundle.digest),
      copyButton("Copy", () => bundle.digest, { name: "Copy the digest" }),
    ),
    factList(models, "facts long"),
    factList(facts),
    actions,
  );
}

function pairing(manifest) {
  const { pairs } = evidence(manifest.evaluation);
  const chosen = chosenPairs(manifest);
  const known = pairs.length > 0 ? pairs : chosen;
  return element(
    "section",
    { class: "card" },
    element("h3", {}, "How layers were paired"),
    known.length > 0
      ? pairsChart(known, chosen)
      : element(
          "p",
          { class: "muted" },
          "The bundle names no layer pairs: its vectors do not come from an expert's layers.",
        ),
  );
}

function evaluation(manifest) {
  const found = evidence(manifest.evaluation);
  const isMeasured = found.doses.length > 0 || found.conditions.length > 0;
  return element(
    "section",
    { class: "card" },
    element("h3", {}, "How well it works"),
    isMeasured ? null : element("div", { class: "notice" }, element("p", {}, prose(unmeasured(manifest.evaluation)))),
    found.doses.length > 0
      ? doseChart(found, manifest)
      : missing(isMeasured, "No strengths were compared, so there is no dose-response curve."),
    found.conditions.length > 0 ? conditionsChart(found) : missing(isMeasured, "No controls were measured."),
    found.numLeftOut > 0
      ? element(
          "p",
          { class: "hint" },
          `${found.numLeftOut} entries of the evaluation are not drawn; they are below as they are.`,
        )
      : null,
    Object.keys(manifest.evaluation).length > 0 ? raw(manifest.evaluation) : null,
  );
}

function missing(isMeasured, text) {
  return isMeasured ? element("p", { class: "muted" }, text) : null;
}

function unmeasured(figures) {
  return "source" in figures
    ? "No measurement comes with this bundle. Its vectors were imported from a file, which says nothing about their effect."
    : "No measurement comes with this bundle; it was packed by hand. What it does to answers, and what it costs, is unknown " +
        "until `expertsteer eval` has measured it.";
}

function raw(figures) {
  const text = JSON.stringify(figures, null, 2);
  const isCut = text.length > MAX_RAW;
  return element(
    "details",
    {},
    element("summary", {}, "All figures of the evaluation, as JSON"),
    isCut ? element("p", { class: "hint" }, `The first ${MAX_RAW} of ${text.length} characters.`) : null,
    element("pre", { class: "code raw", tabindex: "0" }, text.slice(0, MAX_RAW)),
  );
}

function deployment(bundle) {
  const workers = bundle.residency.map(({ replica, rank, keys }) => [
    `replica ${replica}, rank ${rank}`,
    keys.length > 0 ? keys.map((key) => layersOfKey(key)).join("; ") : "not loaded",
  ]);
  const current = bundle.used_by.filter((use) => use.is_current);
  const uses = [...current, ...bundle.used_by.filter((use) => !use.is_current)];
  const rows = uses
    .slice(0, MAX_USES)
    .map((use) => [use.profile, String(use.generation), use.is_current ? "yes" : "no"]);
  return element(
    "section",
    { class: "card" },
    element("h3", {}, "Where it is now"),
    element("h4", {}, "Workers of this server"),
    tableOf({ columns: ["Worker", "Holds"], rows: workers }, "Workers of this server"),
    element("h4", {}, "Used by"),
    rows.length > 0
      ? tableOf({ columns: ["Profile", "Version", "Current"], rows }, "Used by")
      : element("p", { class: "muted" }, "No recent version of a profile names it."),
    uses.length > rows.length
      ? element("p", { class: "hint" }, `and ${uses.length - rows.length} more versions`)
      : null,
  );
}

function layersOfKey(key) {
  const layers = key.split("+")[1];
  return layers === undefined ? "all of its layers" : `its layers ${layers}`;
}

function provenance(bundle, manifest, tensors) {
  const tools = Object.entries(manifest.tool_versions).map(([tool, version]) => `${tool} ${version}`);
  const facts = [
    ["Added", `${time(bundle.added_at)} by ${bundle.added_by}`],
    ["From", bundle.source],
    ["Signed by", bundle.signer ?? "no checked signature"],
    ["Data", digestOf(manifest.data_digest)],
    ["Target weights", digestOf(manifest.target.fingerprint)],
    ["Expert weights", digestOf(manifest.expert?.fingerprint)],
    ["Made with", listed(tools)],
    ["Seed", String(manifest.seed)],
  ];
  const rows = tensors.evidence.map(({ name, shape, dtype, num_bytes: numBytes }) => [
    name,
    shape.join(" × ") || "scalar",
    dtype,
    size(numBytes),
  ]);
  return element(
    "section",
    { class: "card" },
    element("h3", {}, "Where it comes from"),
    factList(facts, "facts long"),
    rows.length > 0
      ? element(
          "details",
          {},
          element("summary", {}, `${rows.length} evidence tensors, which servers skip`),
          tableOf({ columns: ["Name", "Shape", "Type", "Size"], rows }, "Evidence tensors"),
        )
      : null,
  );
}

function digestOf(digest) {
  return digest ? element("code", {}, digest) : NONE;
}

function factList(facts, className = "facts") {
  return element(
    "dl",
    { class: className },
    facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}

function modelText({ id, architecture, hidden_size: hidden, num_layers: layers, revision }) {
  return `${id}, ${architecture}, hidden size ${hidden}, ${layers} layers${revision ? `, revision ${revision}` : ""}`;
}

function scopeText(manifest) {
  const excluded = (manifest.exclude ?? []).map((span) => span.replaceAll("_", " "));
  return SCOPES[manifest.scope] + (excluded.length > 0 ? `, without ${excluded.join(", ")}` : "");
}
