/* Figures, ranges, sizes and times as people read them. What is no figure is a dash. */

export const NONE = "\u2013";
const UNITS = ["bytes", "KiB", "MiB", "GiB"];
const TIME = { dateStyle: "medium", timeStyle: "short" };

/** A number with `digits` significant ones, and a real minus sign. */
export function figure(value, digits = 4) {
  return Number.isFinite(value) ? String(Number(value.toPrecision(digits))).replaceAll("-", "\u2212") : NONE;
}

/** "0.858 to 0.941". */
export function interval(range, digits = 4) {
  return range === null ? NONE : `${figure(range[0], digits)} to ${figure(range[1], digits)}`;
}

export function size(numBytes) {
  const unit = Math.min(UNITS.length - 1, Math.floor(Math.log2(Math.max(numBytes, 1)) / 10));
  return `${figure(numBytes / 1024 ** unit, 3)} ${UNITS[unit]}`;
}

/** A time of the server in the reader's time zone; what is none is shown as it is. */
export function time(text) {
  const found = new Date(text);
  return Number.isNaN(found.getTime()) ? String(text ?? NONE) : found.toLocaleString(undefined, TIME);
}

export function listed(values) {
  return values.length > 0 ? values.join(", ") : NONE;
}
