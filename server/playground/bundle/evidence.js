/* What a manifest's `evaluation` says, checked: anybody may have written it, so each figure is looked at before it is
 * drawn. What is missing or of another form is null or left out.
 *
 *   doses        [{ strength, accuracy, accuracyRange, perplexity, perplexityRange, retention, retentionRange }], upwards
 *   conditions   [{ name, value, range, spread, count, strength, p }] of the test split
 *   questions    how many questions the test split has
 *   pairs        [{ expert, target, accepted, scores }] of all layer pairs that were looked at; `scores` is a Map
 *   numLeftOut   entries that were of another form, or too many to draw
 */

export const MAX_DOSES = 200;
export const MAX_PAIRS = 4096;
const MAX_CONDITIONS = 40;
// The order in which people compare them; others follow by name.
const ORDER = ["on", "off", "negated", "prompt", "expert", "own", "untrained", "random", "permuted-labels"];

export function evidence(evaluation) {
  const doses = read(evaluation.dose_response, dose, MAX_DOSES);
  const pairs = read(evaluation.pairs, pair, MAX_PAIRS);
  const test = object(evaluation.test) ?? {};
  const found = Object.entries(test).filter(([name]) => name !== "questions");
  const conditions = read(found, (entry) => condition(entry, object(evaluation.p_holm) ?? {}), MAX_CONDITIONS);
  return {
    doses: doses.items.sort((left, right) => left.strength - right.strength),
    conditions: conditions.items.sort((left, right) => rank(left) - rank(right) || (left.name < right.name ? -1 : 1)),
    questions: number(test.questions),
    pairs: pairs.items,
    numLeftOut: doses.numLeftOut + pairs.numLeftOut + conditions.numLeftOut,
  };
}

/** Figures of layer pairs as a manifest lists them: those that were chosen. */
export function chosenPairs(manifest) {
  return manifest.layer_pairs.map(({ expert, target, scores }) => ({
    expert,
    target,
    accepted: true,
    scores: scoresOf(scores),
  }));
}

export function number(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

function range(value) {
  const isRange = Array.isArray(value) && value.length === 2 && value.every((bound) => number(bound) !== null);
  return isRange && value[0] <= value[1] ? value : null;
}

function object(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value) ? value : null;
}

function read(entries, parse, most) {
  const listed = Array.isArray(entries) ? entries : [];
  const items = listed
    .slice(0, most)
    .map(parse)
    .filter((item) => item !== null);
  return { items, numLeftOut: listed.length - items.length };
}

function dose(entry) {
  const { strength, accuracy } = object(entry) ?? {};
  if (number(strength) === null || number(accuracy) === null) {
    return null;
  }
  return {
    strength,
    accuracy,
    accuracyRange: range(entry.accuracy_interval),
    perplexity: number(entry.perplexity_ratio),
    perplexityRange: range(entry.perplexity_ratio_interval),
    retention: number(entry.retention),
    retentionRange: range(entry.retention_interval),
  };
}

/** Of a single steering `accuracy`; of several draws, as of random directions, `mean`, `minimum` and `maximum`. */
function condition([name, entry], pValues) {
  const figures = object(entry) ?? {};
  const value = number(figures.accuracy) ?? number(figures.mean);
  if (value === null) {
    return null;
  }
  return {
    name,
    value,
    range: range(figures.accuracy_interval) ?? range(figures.mean_interval),
    spread: range([figures.minimum, figures.maximum]),
    count: number(figures.count),
    strength: number(figures.strength),
    // Against steering as recommended: of a single condition corrected by Holm, of draws by rank.
    p: number(pValues[name]) ?? number(figures.p_value),
  };
}

function pair(entry) {
  const { expert, target, accepted, ...figures } = object(entry) ?? {};
  if (!isLayer(expert) || !isLayer(target)) {
    return null;
  }
  const scores = scoresOf(figures);
  return { expert, target, accepted: accepted !== false, scores };
}

/** A Map: names of a manifest may be those of what every object has. */
function scoresOf(figures) {
  return new Map(Object.entries(figures).filter(([, value]) => number(value) !== null));
}

function isLayer(value) {
  return Number.isInteger(value) && value >= 0;
}

function rank({ name }) {
  const found = ORDER.indexOf(name);
  return found < 0 ? ORDER.length : found;
}
