/* A strength: a slider from the negative bound to the bound, marks at 0 and at the default, and a number beside it. */

import { element, freshId } from "./dom.js";
import { strengthText } from "./numbers.js";

const THUMB_PX = 18;
const STEPS = 80;

/** A step of 1, 2 or 5 times a power of ten, about 80 of them from 0 to `maximum`. */
export function stepOf(maximum) {
  const rough = maximum / STEPS;
  const power = 10 ** Math.floor(Math.log10(rough));
  return Number((([1, 2, 5].find((factor) => factor * power >= rough * 0.999) ?? 10) * power).toPrecision(1));
}

/** Control for the strength of `profile`; `onChange(value)` is called with valid strengths only. */
export function strengthControl(profile, value, onChange) {
  const { strength: standard, maximum_strength: maximum } = profile;
  const id = freshId("strength");
  const step = stepOf(maximum);
  // Steps count from the lower end, so that end is a whole number of them below 0; the field reaches the rest.
  const bound = Number((Math.floor(maximum / step + 1e-9) * step).toPrecision(12));
  const slider = element("input", {
    type: "range",
    id,
    step,
    min: -bound,
    max: bound,
    "aria-describedby": `${id}-default ${id}-marks`,
  });
  const number = element("input", {
    type: "number",
    step: "any",
    min: -maximum,
    max: maximum,
    required: true,
    "aria-label": `Strength of ${profile.name} as a number`,
  });
  const above = element("div", { class: "marks above", id: `${id}-default` }, mark(standard, bound, "default"));
  const below = element(
    "div",
    { class: "marks", id: `${id}-marks` },
    mark(-maximum, bound, strengthText(-maximum)),
    mark(0, bound, "off"),
    mark(maximum, bound, strengthText(maximum)),
  );

  function show(strength) {
    slider.setAttribute("aria-valuetext", strength === 0 ? "0, off" : strengthText(strength));
    fill(slider, strength, bound);
  }

  slider.addEventListener("input", () => {
    number.value = slider.value;
    show(slider.valueAsNumber);
    onChange(slider.valueAsNumber);
  });
  number.addEventListener("input", () => {
    if (number.validity.valid) {
      slider.value = number.value;
      show(number.valueAsNumber);
      onChange(number.valueAsNumber);
    }
  });
  number.value = String(value);
  slider.value = String(value);
  show(value);
  return element(
    "div",
    { class: "strength" },
    element("label", { for: id, class: "label" }, "Strength"),
    number,
    element("div", { class: "strength-slider" }, above, slider, below),
  );
}

/** Tell the style sheet which part between the bounds lies between 0 and a strength. */
export function fill(node, strength, maximum) {
  const share = fraction(strength, maximum);
  node.style.setProperty("--from", String(Math.min(0.5, share)));
  node.style.setProperty("--to", String(Math.max(0.5, share)));
}

function mark(value, maximum, text) {
  const label = element("span", { class: "mark" }, text);
  const share = fraction(value, maximum);
  // The thumb's centre stays half a thumb away from both ends.
  label.style.left = `calc(${THUMB_PX / 2}px + (100% - ${THUMB_PX}px) * ${share})`;
  // Text at the ends stays inside.
  label.style.transform = `translateX(${-100 * share}%)`;
  label.style.setProperty("--tick", `${100 * share}%`);
  return label;
}

function fraction(value, maximum) {
  return (Math.min(Math.max(value, -maximum), maximum) + maximum) / (2 * maximum);
}
