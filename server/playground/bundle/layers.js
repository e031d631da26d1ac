/* Where a bundle acts: a strip of all layers of the target, those with interventions filled by their kind. */

import { chart, horizontalAxis, linear, text } from "./charts.js";
import { svg } from "../dom.js";
import { NONE, figure } from "../format.js";
import { countText } from "../numbers.js";

const LEFT = 8;
const RIGHT = 8;
const STRIP = 26;
const BARS = 84;
const TOP = 24;
const NARROW = 520;

/** `rows` are those of GET .../tensors, null when they are not known. */
export function layersChart(manifest, rows) {
  const steps = stepsOf(manifest, rows);
  const kinds = [...new Set(steps.map((step) => step.kind))];
  const numLayers = manifest.target.num_layers;
  const numSteered = new Set(steps.map((step) => step.layer)).size;
  return chart({
    title: "Layers",
    note:
      `${countText(steps.length, "intervention")} in ${numSteered} of ${numLayers} layers` +
      (rows === null ? "; the sizes of their rows are not known." : "; the bars are the sizes of their rows."),
    label: `${countText(steps.length, "intervention")} in ${numSteered} of ${numLayers} layers.`,
    legend: kinds.map((kind) => ({ text: kind, className: `kind-${kind}` })),
    draw: (width) => drawing(width, steps, numLayers, rows !== null),
    table: {
      columns: ["Layer", "Kind", "Read row, norm", "Write row, norm", "Parameters"],
      rows: steps.map((step) => [
        String(step.layer),
        step.kind,
        normText(step.read, step.norms.read),
        normText(step.write, step.norms.write),
        step.details.join(", ") || NONE,
      ]),
    },
  });
}

function stepsOf(manifest, rows) {
  const norms = new Map((rows ?? []).map((row) => [row.name, row.norms]));
  return manifest.interventions.map((step) => {
    const found = { read: norms.get(step.read) ?? null, write: norms.get(step.write) ?? null };
    // What is written decides how far a token moves; steps that write nothing have a row that they read.
    const shown = found.write ?? found.read;
    return { ...step, norms: found, norm: shown === null ? null : Math.max(...shown), details: detailsOf(step) };
  });
}

function detailsOf(step) {
  const said = Object.entries(step.parameters ?? {}).map(([name, value]) =>
    value === true ? name : `${name} ${typeof value === "number" ? figure(value) : value}`,
  );
  return [
    ...said,
    ...(step.keep_norm ? ["keeps the norm"] : []),
    ...(step.gate ? [`gate ${step.gate}`] : []),
    ...(step.sets ? [`sets gate ${step.sets}`] : []),
  ];
}

function drawing(width, steps, numLayers, hasNorms) {
  const [left, right] = [LEFT, width - RIGHT];
  const cell = (right - left) / numLayers;
  const top = hasNorms ? TOP + BARS : 4;
  const gap = cell > 6 ? 2 : 0;
  const most = Math.max(...steps.map((step) => step.norm ?? 0));
  const byLayer = Map.groupBy(steps, (step) => step.layer);
  const cells = Array.from({ length: numLayers }, (_, layer) =>
    svg("rect", {
      class: "layer",
      x: left + layer * cell + gap / 2,
      y: top,
      width: cell - gap,
      height: STRIP,
      rx: gap,
    }),
  );
  const filled = [...byLayer].flatMap(([layer, here]) =>
    here.map((step, index) => stepNodes(step, index, here.length, { x: left + layer * cell, top, cell, most })),
  );
  const numTicks = width < NARROW ? 6 : 12;
  const every = Math.ceil(numLayers / numTicks);
  const numbered = Array.from({ length: Math.ceil(numLayers / every) }, (_, index) => index * every);
  const middle = linear([0, numLayers], [left + cell / 2, right + cell / 2]);
  return {
    height: top + STRIP + 50,
    drawing: [
      hasNorms ? text(left, 12, `2-norm of the row, up to ${figure(most)}`, { class: "axis-name" }) : [],
      cells,
      filled,
      horizontalAxis({
        scale: middle,
        values: numbered,
        left,
        right,
        y: top + STRIP + 4,
        name: "Decoder layer of the target, from 0",
        format: String,
      }),
    ],
    spots: [...byLayer]
      .sort(([first], [second]) => first - second)
      .map(([layer, here]) => ({
        x: left + layer * cell,
        y: hasNorms ? TOP : 2,
        width: cell,
        height: top + STRIP - (hasNorms ? TOP : 0),
        lines: [`layer ${layer}`, ...here.map(lineOf)],
      })),
  };
}

/** The part of a layer's field that an intervention has, and its bar above. */
function stepNodes({ kind, norm }, index, count, { x, top, cell, most }) {
  const height = STRIP / count;
  const gap = cell > 6 ? 2 : 0;
  // A layer of a deep model is thinner than a pixel; what acts must still be seen.
  const width = Math.max(2, cell - gap);
  const nodes = [
    svg("rect", {
      class: `kind-${kind}`,
      x: x + gap / 2,
      y: top + index * height,
      width,
      height,
      rx: count > 1 ? 0 : gap,
    }),
  ];
  if (norm !== null && most > 0) {
    const bar = Math.max(2, (norm / most) * (BARS - 10));
    const part = Math.min(28, width / count);
    const start = x + cell / 2 - (part * count) / 2 + index * part;
    nodes.push(
      svg("rect", {
        class: `kind-${kind}`,
        x: start,
        y: top - 6 - bar,
        width: Math.max(1.5, part - 2),
        height: bar,
        rx: 2,
      }),
    );
  }
  return nodes;
}

function lineOf(step) {
  const norm = step.norm === null ? "" : `, norm ${figure(step.norm)}`;
  return [`${step.kind}${norm}`, ...step.details].join(", ");
}

function normText(name, norms) {
  return name === null ? "none" : norms === null ? "not known" : norms.map((norm) => figure(norm, 6)).join(", ");
}
