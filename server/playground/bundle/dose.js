/* Dose and response: the score against the strength, and below it what steering costs, on the same axis. */

import { chart, extent, horizontalAxis, line, linear, text, ticks, verticalAxis } from "./charts.js";
import { svg } from "../dom.js";
import { figure, interval } from "../format.js";

const LEFT = 52;
const RIGHT = 14;
const TOP = 56;
const GAP = 40;
const NARROW = 520;
// Means of steerings by chance, and what a prompt alone does: a score says little without them.
const REFERENCES = new Map([
  ["random", "random directions"],
  ["permuted-labels", "permuted labels"],
  ["prompt", "a prompt, unsteered"],
]);

export function doseChart({ doses, conditions, questions }, manifest) {
  const references = conditions.filter(({ name }) => REFERENCES.has(name));
  const panels = panelsOf(doses, references, questions);
  return chart({
    title: "Score and cost by strength",
    note: noteOf(references, panels),
    label: `Accuracy at ${doses.length} strengths from ${figure(doses[0].strength)} to ${figure(doses.at(-1).strength)}.`,
    legend: [
      { text: "this bundle, with its 95 % interval", className: "line-main" },
      ...references.map((each) => ({ text: referenceText(each), className: `line-${each.name}` })),
    ],
    draw: (width) => drawing(width, doses, panels, references, manifest),
    table: tableOf(doses),
  });
}

function panelsOf(doses, references, questions) {
  const of = questions === null ? "test questions" : `${questions} test questions`;
  const panels = [
    {
      name: `Accuracy, share of ${of}`,
      value: (dose) => dose.accuracy,
      range: (dose) => dose.accuracyRange,
      domain: [0, 1],
      baseline: null,
      height: 220,
      format: figure,
    },
  ];
  if (doses.some((dose) => dose.perplexity !== null)) {
    panels.push(costPanel("Perplexity of neutral text, steered / unsteered", "perplexity", doses));
  }
  // Without a loss there is nothing to see: the table has it.
  if (doses.some((dose) => dose.retention !== null && dose.retention !== 1)) {
    panels.push(costPanel("Other answers kept, steered / unsteered", "retention", doses));
  }
  return panels;
}

function costPanel(name, key, doses) {
  const ranges = doses.map((dose) => dose[`${key}Range`]);
  return {
    name,
    value: (dose) => dose[key],
    range: (dose) => dose[`${key}Range`],
    domain: extent([...doses.map((dose) => dose[key]), ...ranges.flatMap((range) => range ?? [])], [1], 0.15),
    baseline: 1,
    height: 96,
    format: (value) => `×${figure(value)}`,
  };
}

function drawing(width, doses, panels, references, manifest) {
  const marks = marksOf(manifest);
  const strengths = [...doses.map((dose) => dose.strength), ...marks.map((mark) => mark.strength)];
  const right = width - RIGHT;
  const x = linear(extent(strengths, [0], 0.03), [LEFT, right]);
  const parts = [];
  const bottoms = [];
  let top = TOP;
  for (const panel of panels) {
    const bottom = top + panel.height;
    const y = linear(panel.domain, [bottom, top]);
    parts.push(panelNodes(panel, doses, { x, y, top, right }));
    if (panel === panels[0]) {
      parts.push(references.map((each) => line(LEFT, y(each.value), right, y(each.value), `line-${each.name}`)));
    }
    parts.push(curve(panel, doses, x, y));
    bottoms.push(bottom);
    top = bottom + GAP;
  }
  const bottom = bottoms.at(-1);
  const values = ticks(extent(strengths, [0], 0), width < NARROW ? 4 : 8);
  const axis = { scale: x, values, left: LEFT, right, y: bottom, name: "Strength", format: figure };
  const spots = doses.map((dose) => ({
    x: x(dose.strength),
    y: TOP,
    width: 0,
    height: bottom - TOP,
    lines: linesOf(dose),
  }));
  return {
    height: bottom + 48,
    drawing: [
      marks.map((mark, index) => line(x(mark.strength), markRow(index) - 8, x(mark.strength), bottom, mark.className)),
      marks.map((mark, index) => markName(mark, markRow(index), x(mark.strength), width)),
      parts,
      horizontalAxis(axis),
    ],
    spots,
  };
}

function panelNodes(panel, doses, { x, y, top, right }) {
  const values = ticks(panel.domain, panel.height > 150 ? 5 : 3);
  return [
    text(LEFT - 44, top - 10, panel.name, { class: "axis-name" }),
    verticalAxis({ scale: y, values, left: LEFT, right, format: panel.format }),
    panel.baseline === null ? [] : line(LEFT, y(panel.baseline), right, y(panel.baseline), "axis"),
  ];
}

function curve(panel, doses, x, y) {
  const measured = doses.filter((dose) => panel.value(dose) !== null);
  const known = measured.filter((dose) => panel.range(dose) !== null);
  const at = (dose, value) => `${x(dose.strength).toFixed(1)} ${y(value).toFixed(1)}`;
  const upper = known.map((dose) => at(dose, panel.range(dose)[1]));
  const lower = known.map((dose) => at(dose, panel.range(dose)[0])).reverse();
  return [
    known.length > 1 ? svg("path", { class: "band", d: `M${[...upper, ...lower].join("L")}Z` }) : [],
    known.map((dose) => {
      const [low, high] = panel.range(dose);
      return line(x(dose.strength), y(low), x(dose.strength), y(high), "whisker");
    }),
    measured.length > 0
      ? svg("path", { class: "line-main", d: `M${measured.map((dose) => at(dose, panel.value(dose))).join("L")}` })
      : [],
    measured.map((dose) => svg("circle", { class: "dot", cx: x(dose.strength), cy: y(panel.value(dose)), r: 4.5 })),
  ];
}

function marksOf({ recommended_strength: recommended, maximum_strength: maximum }) {
  return recommended === maximum
    ? [{ strength: maximum, name: `recommended and maximum ${figure(maximum)}`, className: "mark-recommended" }]
    : [
        { strength: recommended, name: `recommended ${figure(recommended)}`, className: "mark-recommended" },
        { strength: maximum, name: `maximum ${figure(maximum)}`, className: "mark-maximum" },
      ];
}

/** The names on top of the vertical lines have a row each, so that they never cover each other. */
function markRow(index) {
  return 11 + index * 15;
}

function markName({ name, className }, y, x, width) {
  const isRight = x > width / 2;
  return text(x + (isRight ? -5 : 5), y, name, {
    class: `${className}-name`,
    "text-anchor": isRight ? "end" : "start",
  });
}

function linesOf(dose) {
  const lines = [`strength ${figure(dose.strength)}`, `accuracy ${withRange(dose.accuracy, dose.accuracyRange)}`];
  if (dose.perplexity !== null) {
    lines.push(`perplexity ×${withRange(dose.perplexity, dose.perplexityRange, 5)}`);
  }
  if (dose.retention !== null) {
    lines.push(`kept ${withRange(dose.retention, dose.retentionRange)}`);
  }
  return lines;
}

function withRange(value, range, digits = 4) {
  return range === null ? figure(value, digits) : `${figure(value, digits)} (${interval(range, digits)})`;
}

function referenceText({ name, value, count, strength }) {
  const of = count === null ? "" : `, mean of ${count}`;
  const at = strength === null || name === "prompt" ? "" : ` at strength ${figure(strength)}`;
  return `${REFERENCES.get(name)}${of}: ${figure(value, 3)}${at}`;
}

function noteOf(references, panels) {
  const parts = [];
  if (references.some(({ count }) => count !== null)) {
    parts.push("Controls by chance have the size of the recommended strength.");
  } else {
    parts.push("The bundle says nothing about controls by chance, such as random directions.");
  }
  if (!panels.some((panel) => panel.name.startsWith("Perplexity"))) {
    parts.push("Its perplexity was not measured.");
  }
  return parts.join(" ");
}

function tableOf(doses) {
  return {
    columns: ["Strength", "Accuracy", "95 % interval", "Perplexity, × unsteered", "95 % interval", "Kept, × unsteered"],
    rows: doses.map((dose) => [
      figure(dose.strength),
      figure(dose.accuracy, 6),
      interval(dose.accuracyRange),
      figure(dose.perplexity, 6),
      interval(dose.perplexityRange, 6),
      figure(dose.retention, 6),
    ]),
  };
}
