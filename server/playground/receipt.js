/* A receipt: what ran, as the server says it. */

import { copyButton } from "./clipboard.js";
import { element } from "./dom.js";
import { countText, shortDigest, strengthText } from "./numbers.js";

/** A receipt; `isFolded` shows its last line only until it is opened. */
export function receiptView(receipt, isFolded) {
  const facts = factsOf(receipt);
  const { tokens_steered: tokens } = receipt;
  return isFolded
    ? element("details", {}, element("summary", {}, `Receipt \u00b7 ${countText(tokens, "token")} steered`), facts)
    : facts;
}

function factsOf(receipt) {
  const { profile, bundle, strength, scope, layers, tokens_steered: tokens } = receipt;
  return element(
    "dl",
    { class: "receipt" },
    fact("Profile", profile),
    fact("Strength", strengthText(strength)),
    fact("Scope", scope),
    fact(layers.length === 1 ? "Layer" : "Layers", layers.join(", ")),
    fact("Tokens steered", String(tokens)),
    fact("Bundle", [
      element("code", { title: bundle }, shortDigest(bundle)),
      copyButton("Copy", () => bundle, { name: `Copy the digest of ${profile}`, classes: "quiet small" }),
    ]),
  );
}

function fact(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}
