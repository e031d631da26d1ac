/* Figures as text. */

/** A strength: up to four decimals, with a real minus sign. */
export function strengthText(value) {
  return signed(String(Number(value.toFixed(4))));
}

/** A duration with its unit. */
export function durationText(ms) {
  if (ms < 1000) {
    return `${Math.round(ms)}\u00a0ms`;
  }
  return `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)}\u00a0s`;
}

/** A rate: one decimal below 100. */
export function rateText(perS) {
  return perS < 100 ? perS.toFixed(1) : String(Math.round(perS));
}

/** "1 word", "2 words". */
export function countText(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** First digits of a digest, enough to tell bundles apart and to name one in a request. */
export function shortDigest(digest) {
  return digest.slice(0, "sha256:".length + 8);
}

function signed(text) {
  return text.replace("-", "\u2212");
}
