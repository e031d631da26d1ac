/* Pairs of layers, expert against target: a map of one score at a time, with the chosen pairs framed. */

import { chart, tableOf, text } from "./charts.js";
import { element, field, replace, svg } from "../dom.js";
import { figure } from "../format.js";
import { MAX_PAIRS } from "./evidence.js";

const LEFT = 52;
const BOTTOM = 46;
const TOP = 22;
const NAMES = new Map([
  ["held_out", "gain on the tuning split (held_out)"],
  ["r2", "fit on held-out texts (r2)"],
  ["mi", "mutual information (mi), nats"],
]);
// Width of a field that has room for a number.
const MIN_NUMBERED = 44;

/** A map with a choice of the score; a table where there are no scores, or more fields than can be drawn.
 *
 * `pairs` as in evidence.js, `chosen` the manifest's own.
 */
export function pairsChart(pairs, chosen) {
  const scores = scoresOf(pairs);
  if (scores.length === 0) {
    const rows = pairs.map(({ expert, target }) => [String(expert), String(target)]);
    return tableOf({ columns: ["Expert layer", "Target layer"], rows }, "Layer pairs, without scores");
  }
  const select = element(
    "select",
    {},
    scores.map((name) => element("option", { value: name }, NAMES.get(name) ?? name)),
  );
  const place = element("div");
  const show = () => replace(place, mapOf(pairs, chosen, select.value));
  select.addEventListener("change", show);
  show();
  return element("div", { class: "stack" }, scores.length > 1 ? field("Score of the pairs", select) : null, place);
}

/** Names of the scores that any pair has, the usual ones first. */
function scoresOf(pairs) {
  const names = [...new Set(pairs.flatMap(({ scores }) => [...scores.keys()]))].sort();
  return [...[...NAMES.keys()].filter((name) => names.includes(name)), ...names.filter((name) => !NAMES.has(name))];
}

function mapOf(pairs, chosen, score) {
  const name = NAMES.get(score) ?? score;
  const experts = [...new Set(pairs.map((pair) => pair.expert))].sort((left, right) => left - right);
  const targets = [...new Set(pairs.map((pair) => pair.target))].sort((left, right) => left - right);
  const byPlace = new Map(pairs.map((pair) => [`${pair.expert} ${pair.target}`, pair]));
  const isChosen = (pair) => chosen.some((each) => each.expert === pair.expert && each.target === pair.target);
  const table = {
    columns: ["Expert layer", "Target layer", name, "Used"],
    rows: pairs.map((pair) => [
      String(pair.expert),
      String(pair.target),
      figure(pair.scores.get(score), 6),
      isChosen(pair) ? "yes" : "no",
    ]),
  };
  // A few pairs may name many layers, and a map has a field for every expert layer and target layer.
  if (experts.length * targets.length > MAX_PAIRS) {
    return tableOf(table, `Layer pairs, ${name}`);
  }
  const values = pairs.map((pair) => pair.scores.get(score)).filter((value) => value !== undefined);
  const range = values.length > 0 ? [Math.min(...values), Math.max(...values)] : [0, 1];
  const map = { experts, targets, byPlace, isChosen, score, range };
  return chart({
    title: "Layer pairs",
    note:
      `Colour: ${name}, from ${figure(range[0])} (light) to ${figure(range[1])} (strong). A frame marks what the bundle ` +
      "uses, a hatched field what was not measured.",
    label: `${name} of ${pairs.length} pairs of ${experts.length} expert and ${targets.length} target layers.`,
    draw: (width) => drawing(width, map),
    table,
  });
}

function drawing(width, map) {
  const { experts, targets, byPlace, isChosen, score, range } = map;
  const step = Math.min(72, (width - LEFT - 8) / targets.length);
  const high = Math.min(44, Math.max(8, step));
  const bottom = TOP + experts.length * high;
  const every = Math.ceil(26 / step);
  const spots = [];
  const cells = [];
  const frames = [];
  // From the last layer down, as one reads a network.
  [...experts].reverse().forEach((expert, row) => {
    targets.forEach((target, column) => {
      const pair = byPlace.get(`${expert} ${target}`);
      const value = pair?.scores.get(score);
      const box = { x: LEFT + column * step + 1, y: TOP + row * high + 1, width: step - 2, height: high - 2 };
      cells.push(cellNodes(box, value, range, step));
      if (pair !== undefined && isChosen(pair)) {
        frames.push(svg("rect", { class: "frame", rx: 4, ...box }));
      }
      spots.push({ ...box, lines: linesOf(expert, target, pair, score, isChosen) });
    });
  });
  const rowNames = [...experts]
    .reverse()
    .map((expert, row) =>
      row % Math.ceil(14 / high) === 0
        ? text(LEFT - 8, TOP + (row + 0.5) * high + 4, expert, { class: "tick", "text-anchor": "end" })
        : [],
    );
  const columnNames = targets.map((target, column) =>
    column % every === 0
      ? text(LEFT + (column + 0.5) * step, bottom + 16, target, { class: "tick", "text-anchor": "middle" })
      : [],
  );
  const middle = LEFT + (targets.length * step) / 2;
  return {
    height: bottom + BOTTOM,
    columns: targets.length,
    drawing: [
      hatching(),
      text(8, 12, "Expert layer", { class: "axis-name" }),
      cells,
      frames,
      rowNames,
      columnNames,
      text(middle, bottom + 36, "Target layer", { class: "axis-name", "text-anchor": "middle" }),
    ],
    spots,
  };
}

function hatching() {
  const stripe = svg("path", { class: "hatch", d: "M0 6L6 0" });
  return svg("defs", {}, svg("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse" }, stripe));
}

function cellNodes(box, value, [low, high], step) {
  if (value === undefined) {
    return svg("rect", { fill: "url(#hatch)", rx: 4, ...box });
  }
  const share = high > low ? (value - low) / (high - low) : 1;
  const number = { x: box.x + box.width / 2, y: box.y + box.height / 2 + 4 };
  return [
    svg("rect", { class: "cell", "fill-opacity": (0.06 + 0.94 * share).toFixed(3), rx: 4, ...box }),
    step >= MIN_NUMBERED
      ? text(number.x, number.y, figure(value, 2), {
          class: "cell-number",
          "text-anchor": "middle",
        })
      : [],
  ];
}

function linesOf(expert, target, pair, score, isChosen) {
  const lines = [`expert layer ${expert}, target layer ${target}`];
  if (pair === undefined || pair.scores.get(score) === undefined) {
    lines.push(`${score}: not measured`);
  } else {
    lines.push(`${score} ${figure(pair.scores.get(score))}`);
  }
  if (pair !== undefined && isChosen(pair)) {
    lines.push("used by the bundle");
  } else if (pair !== undefined && !pair.accepted) {
    lines.push("not accepted");
  }
  return lines;
}
