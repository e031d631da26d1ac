/* The test split under every condition: steered, unsteered, controls by chance, and what a prompt or the expert does. */

import { chart, horizontalAxis, line, linear, text, ticks } from "./charts.js";
import { svg } from "../dom.js";
import { figure, interval } from "../format.js";

const NAMES = new Map([
  ["on", "steered, as recommended"],
  ["off", "unsteered"],
  ["negated", "steered the other way"],
  ["prompt", "a prompt, unsteered"],
  ["expert", "the expert itself"],
  ["own", "the target's own direction"],
  ["untrained", "an untrained expert"],
  ["random", "random directions"],
  ["permuted-labels", "permuted labels"],
  ["shuffled-pairs", "shuffled pairs"],
]);
const ROW = 30;
const NARROW = 520;
const NARROW_ROW = 44;

export function conditionsChart({ conditions, questions }) {
  return chart({
    title: "Against controls",
    note:
      "The score at the recommended strength next to what it should beat: directions by chance of the same size, labels " +
      "at random, and no steering at all.",
    label: `Accuracy under ${conditions.length} conditions.`,
    legend: [
      { text: "value with its 95 % interval", className: "line-main" },
      ...(conditions.some((each) => each.spread !== null)
        ? [{ text: "smallest to largest of the draws", className: "line-spread" }]
        : []),
    ],
    draw: (width) => drawing(width, conditions, questions),
    table: tableOf(conditions),
  });
}

function drawing(width, conditions, questions) {
  const isNarrow = width < NARROW;
  const step = isNarrow ? NARROW_ROW : ROW;
  const [left, right] = [isNarrow ? 8 : 190, width - (isNarrow ? 46 : 56)];
  const x = linear([0, 1], [left, right]);
  const bottom = conditions.length * step + 8;
  const rows = conditions.map((each, index) => rowNodes(each, index, { x, step, left, right, isNarrow }));
  const of = questions === null ? "test questions" : `${questions} test questions`;
  const values = ticks([0, 1], 5);
  return {
    height: bottom + 48,
    drawing: [
      values.map((value) => line(x(value), 0, x(value), bottom, "grid")),
      rows,
      horizontalAxis({ scale: x, values, left, right, y: bottom, name: `Accuracy, share of ${of}`, format: figure }),
    ],
    spots: conditions.map((each, index) => ({
      x: 1,
      y: index * step + 2,
      width: width - 2,
      height: step,
      lines: linesOf(each),
    })),
  };
}

function rowNodes(each, index, { x, step, left, right, isNarrow }) {
  const y = index * step + (isNarrow ? 30 : step / 2 + 2);
  const className = each.name === "on" ? "dot" : each.count === null ? "dot-plain" : "dot-chance";
  const span = (range, name) => (range === null ? [] : line(x(clip(range[0])), y, x(clip(range[1])), y, name));
  return [
    isNarrow
      ? text(left, y - 12, nameOf(each), { class: "tick" })
      : text(left - 14, y + 4, nameOf(each), {
          class: each.name === "on" ? "tick strong" : "tick",
          "text-anchor": "end",
        }),
    span(each.spread, "line-spread"),
    span(each.range, each.name === "on" ? "range-main" : "range"),
    svg("circle", { class: className, cx: x(clip(each.value)), cy: y, r: 5 }),
    text(right + 12, y + 4, figure(each.value, 3), { class: "tick" }),
  ];
}

/** Accuracy is a share; what a manifest claims beyond that is written, not drawn beyond the axis. */
function clip(value) {
  return Math.max(0, Math.min(1, value));
}

function nameOf({ name, count }) {
  return (NAMES.get(name) ?? name.slice(0, 28)) + (count === null ? "" : ` (${count})`);
}

function linesOf(each) {
  const lines = [nameOf(each), `accuracy ${figure(each.value)} (${interval(each.range)})`];
  if (each.spread !== null) {
    lines.push(`${figure(each.count)} draws, ${interval(each.spread)}`);
  }
  if (each.strength !== null && each.name !== "prompt") {
    lines.push(`strength ${figure(each.strength)}`);
  }
  if (each.p !== null) {
    lines.push(`p ${figure(each.p, 2)} against steering as recommended`);
  }
  return lines;
}

function tableOf(conditions) {
  return {
    columns: ["Condition", "Accuracy", "95 % interval", "Draws", "Smallest to largest", "Strength", "p"],
    rows: conditions.map((each) => [
      nameOf(each),
      figure(each.value, 6),
      interval(each.range),
      figure(each.count),
      interval(each.spread),
      figure(each.strength),
      figure(each.p, 3),
    ]),
  };
}
