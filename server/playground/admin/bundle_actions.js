/* What can be done with a bundle of the registry: serve it under a name, or delete it. */

import { element, replace } from "../dom.js";
import { countText, shortDigest } from "../numbers.js";
import { refusal } from "../refusal.js";
import { askForDeletion, deletionPath } from "./deletion.js";
import { profileForm } from "./profile_form.js";

/** Buttons and the place for what they open; `onChange(text)` comes after a change, with what was done. */
export function bundleActions(api, state, bundle, onChange) {
  const place = element("div", {});
  const close = () => replace(place);

  function serve() {
    const onDone = (answer) => onChange(servedText(answer));
    replace(place, profileForm({ api, state, bundle, action: "Serve it", onDone, close }));
    place.querySelector("input").focus();
  }

  async function remove() {
    const asked = await askForDeletion({
      title: `Delete the bundle ${bundle.name}?`,
      text: `${shortDigest(bundle.digest)} leaves the workers and the registry, and its file is deleted. ${usedText(bundle)}`,
      action: "Delete the bundle",
    });
    if (asked === null) {
      return;
    }
    replace(place, element("p", { class: "muted", role: "status" }, "Deleting …"));
    try {
      await api.send("DELETE", deletionPath(`v1/steering/bundles/${bundle.digest}`, asked));
      await onChange(`${bundle.name} (${shortDigest(bundle.digest)}) is deleted.`);
    } catch (error) {
      replace(place, refusal(api, error, { title: "The bundle was not deleted." }));
    }
  }

  return element(
    "div",
    { class: "stack" },
    element(
      "div",
      { class: "actions" },
      element("button", { type: "button", onclick: serve }, "Serve as a profile"),
      element("button", { type: "button", class: "danger", onclick: remove }, "Delete"),
    ),
    place,
  );
}

export function servedText({ name, generation, observed, changed }) {
  if (!changed) {
    return `${name} was so already; nothing changed.`;
  }
  const seen = observed ? "new requests get it" : "not every process of the server has it yet, see the status";
  return `${name} is now version ${generation}; ${seen}.`;
}

function usedText({ used_by: uses }) {
  const names = new Set(uses.map((use) => use.profile));
  return names.size === 0
    ? "No recent version of a profile names it."
    : `Versions of ${countText(names.size, "profile")} name it; the server refuses while a profile needs it.`;
}
