/* The frame of every chart, and its axes.
 *
 *   chart({ title, note, label, legend, draw, table })   a <figure>
 *     draw(width)   { height, drawing: [svg nodes], spots } for a width in pixels; called again when the width changes
 *     spots         [{ x, y, width, height, lines: [text, ...] }]: what pointer and arrow keys can point at, in reading
 *                   order; `columns` of them make a row of a grid
 *     legend        [{ text, className }]: `className` styles the sample
 *     table         { columns: [text, ...], rows: [[text, ...], ...] }: the same figures without a picture
 *
 * A chart is one stop of the tab key. Arrow keys move from value to value and say each one, as the pointer does.
 */

import { element, freshId, replace, svg } from "../dom.js";

const MIN_WIDTH = 200;
const FIGURE = /^(\u2013|\u2212?[\d.]+(e[+\u2212]\d+)?)$/;
const LONG = 36;

export function chart({ title, note = null, label, legend = [], draw, table }) {
  const id = freshId("chart");
  return element(
    "figure",
    { class: "chart", "aria-labelledby": id },
    element(
      "figcaption",
      {},
      element("h4", { id }, title),
      note === null ? null : element("p", { class: "hint" }, note),
    ),
    legend.length > 0 ? legendOf(legend) : null,
    plot(label, draw),
    element("details", {}, element("summary", {}, "Show as a table"), tableOf(table, title)),
  );
}

/** A table of text; columns of figures are aligned to the right, and those with long texts are wide. */
export function tableOf({ columns, rows }, caption) {
  const classes = columns.map((_, index) => {
    const isFigures = rows.length > 0 && rows.every((row) => FIGURE.test(row[index]));
    return isFigures ? "number" : rows.some((row) => row[index].length > LONG) ? "wide" : null;
  });
  const cell = (tag, content, index, more = {}) => element(tag, { class: classes[index], ...more }, content);
  return element(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element(
      "table",
      { class: "sheet" },
      element("caption", { class: "unseen" }, caption),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          columns.map((name, index) => cell("th", name, index, { scope: "col" })),
        ),
      ),
      element(
        "tbody",
        {},
        rows.map((row) =>
          element(
            "tr",
            {},
            row.map((content, index) => cell("td", content, index)),
          ),
        ),
      ),
    ),
  );
}

/** Map `domain` to `pixels`, both [from, to]. */
export function linear(domain, pixels) {
  const [low, high] = domain;
  const scale = (pixels[1] - pixels[0]) / (high - low || 1);
  return (value) => pixels[0] + (value - low) * scale;
}

/** Round numbers inside a range, about `count` of them. */
export function ticks([low, high], count) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0)) {
    return [low];
  }
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  // Counted in steps: sums of steps would end in 0.30000000000000004.
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

/** A range that holds all values, with some room around them; `always` are values that must be inside too. */
export function extent(values, always = [], margin = 0.08) {
  const known = [...values, ...always].filter((value) => value !== null && value !== undefined);
  const low = Math.min(...known);
  const high = Math.max(...known);
  const room = (high - low || Math.abs(high) || 1) * margin;
  return [low - room, high + room];
}

export function text(x, y, content, attributes = {}) {
  return svg("text", { x, y, ...attributes }, content);
}

export function line(x1, y1, x2, y2, className) {
  return svg("line", { x1, y1, x2, y2, class: className });
}

/** A vertical axis: lines across the panel and their values on its left. */
export function verticalAxis({ scale, values, left, right, format }) {
  return values.flatMap((value) => [
    line(left, scale(value), right, scale(value), "grid"),
    text(left - 8, scale(value) + 4, format(value), { class: "tick", "text-anchor": "end" }),
  ]);
}

/** A horizontal axis: a line, ticks and values below, and its name in the middle under them. */
export function horizontalAxis({ scale, values, left, right, y, name, format }) {
  return [
    line(left, y, right, y, "axis"),
    values.flatMap((value) => [
      line(scale(value), y, scale(value), y + 4, "axis"),
      text(scale(value), y + 18, format(value), { class: "tick", "text-anchor": "middle" }),
    ]),
    text((left + right) / 2, y + 38, name, { class: "axis-name", "text-anchor": "middle" }),
  ];
}

function legendOf(entries) {
  const sample = (className) =>
    svg("svg", { class: "sample", width: 22, height: 12, "aria-hidden": "true" }, line(1, 6, 21, 6, className));
  return element(
    "ul",
    { class: "legend" },
    entries.map(({ text: name, className }) => element("li", {}, sample(className), element("span", {}, name))),
  );
}

function plot(label, draw) {
  const tip = element("div", { class: "tip", role: "status", hidden: true });
  const cursor = svg("path", { class: "cursor", hidden: true });
  const picture = svg("svg", { "aria-hidden": "true" });
  const area = element("div", {
    class: "plot",
    tabindex: "0",
    role: "group",
    "aria-roledescription": "chart",
    "aria-label": `${label} Arrow keys show the values.`,
  });
  area.append(picture, tip);
  let drawn = { spots: [] };
  let current = -1;

  function redraw(width) {
    drawn = draw(Math.max(MIN_WIDTH, Math.floor(width)));
    picture.setAttribute("width", Math.max(MIN_WIDTH, Math.floor(width)));
    picture.setAttribute("height", drawn.height);
    replace(picture, drawn.drawing, cursor);
    hide();
  }

  function point(index) {
    const spot = drawn.spots[index];
    current = index;
    cursor.setAttribute("d", `M${spot.x} ${spot.y}h${spot.width}v${spot.height}h${-spot.width}z`);
    cursor.removeAttribute("hidden");
    replace(
      tip,
      spot.lines.map((each) => element("p", {}, each)),
    );
    tip.hidden = false;
    const middle = spot.x + spot.width / 2 - tip.offsetWidth / 2;
    const above = spot.y - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(0, Math.min(area.clientWidth - tip.offsetWidth, middle))}px`;
    tip.style.top = `${above >= -12 ? above : spot.y + spot.height + 8}px`;
  }

  function hide() {
    current = -1;
    tip.hidden = true;
    cursor.setAttribute("hidden", "");
  }

  area.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const found = nearest(drawn.spots, event.clientX - box.left, event.clientY - box.top);
    if (found >= 0 && found !== current) {
      point(found);
    }
  });
  area.addEventListener("pointerleave", () => document.activeElement === area || hide());
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const row = drawn.columns ?? 1;
    const last = drawn.spots.length - 1;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row, Home: -last, End: last };
    if (event.key === "Escape") {
      hide();
    } else if (event.key in steps && last >= 0) {
      event.preventDefault();
      point(current < 0 ? 0 : Math.max(0, Math.min(last, current + steps[event.key])));
    }
  });
  let width = 0;
  new ResizeObserver(([entry]) => {
    // A tab that is not shown has no width.
    if (entry.contentRect.width > 0 && entry.contentRect.width !== width) {
      width = entry.contentRect.width;
      // Drawing changes the height, which must not happen while sizes are being observed.
      requestAnimationFrame(() => redraw(width));
    }
  }).observe(area);
  return area;
}

/** Index of the spot that is closest to a point; -1 without spots. */
function nearest(spots, x, y) {
  const away = (value, from, length) => Math.max(from - value, 0, value - from - length);
  let best = -1;
  let least = Infinity;
  spots.forEach((spot, index) => {
    const distance = Math.hypot(away(x, spot.x, spot.width), away(y, spot.y, spot.height));
    if (distance < least) {
      [best, least] = [index, distance];
    }
  });
  return best;
}
