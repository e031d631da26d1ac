/* The form that makes a name mean a bundle: a new profile, or another version of one.
 *
 * It never overwrites what it has not seen: a profile that exists is shown before it is changed, and one that somebody
 * else changed meanwhile stays as it is (If-Match).
 */

import { confirmed } from "../dialog.js";
import { element, field, replace } from "../dom.js";
import { figure, listed } from "../format.js";
import { shortDigest } from "../numbers.js";
import { stoppedOrRefused } from "../refusal.js";
import { SCOPES } from "../request.js";

const SPANS = ["tool_calls", "structured_output", "reasoning"];

/** The node of the form.
 *
 * `bundle` is what the profile shall mean (a BundleInfo), `current` the profile that is to be changed (a ProfileDetail) or
 * null, `ensure()` is awaited before and adds the bundle where that is not done yet, `onDone(answer)` comes after,
 * `onConflict(error)` when somebody else changed it meanwhile (null: the form says so), `close` is what Cancel does, null for
 * no such button.
 */
export function profileForm({
  api,
  state,
  bundle,
  current = null,
  ensure = null,
  action,
  onDone,
  onConflict = null,
  close = null,
}) {
  const now = current ?? { ...bundle, allowed_keys: null };
  const controls = {
    name: element("input", {
      name: "profile",
      value: current?.name ?? bundle.name,
      required: true,
      readonly: current !== null,
      pattern: "[a-z0-9][a-z0-9._\\-]{0,63}",
      spellcheck: "false",
      autocomplete: "off",
      title: "Lower-case letters, digits, dots, dashes and underscores; 64 at most",
    }),
    strength: numberInput("strength", now.strength),
    maximum: numberInput("maximum", now.maximum_strength),
    scope: element(
      "select",
      { name: "scope" },
      Object.entries(SCOPES).map(([value, label]) =>
        element("option", { value, selected: value === now.scope }, label),
      ),
    ),
    description: element(
      "textarea",
      { name: "description", rows: "2", maxlength: "2000", dir: "auto" },
      now.description,
    ),
    keys: element("input", { name: "keys", value: (now.allowed_keys ?? []).join(", "), spellcheck: "false" }),
    spans: SPANS.map((span) =>
      element("input", { type: "checkbox", value: span, checked: now.exclude.includes(span) }),
    ),
  };
  const message = element("div", {});
  const submit = element("button", { type: "submit", class: "primary" }, action);
  const form = element(
    "form",
    { class: "stack" },
    element(
      "div",
      { class: "fields" },
      field("Profile", controls.name),
      field("Strength", controls.strength),
      field("Largest strength", controls.maximum),
      field("Tokens to steer", controls.scope),
    ),
    field("Description", controls.description),
    element(
      "details",
      {},
      element("summary", {}, "Spans to leave out, and who may use it"),
      element(
        "div",
        { class: "stack settings" },
        element(
          "fieldset",
          { class: "actions" },
          element("legend", { class: "label" }, "Leave unsteered"),
          controls.spans.map((box) => element("label", { class: "check" }, box, box.value.replaceAll("_", " "))),
        ),
        field("Names of the keys that may use it", controls.keys, "With commas between them; empty means all keys."),
      ),
    ),
    message,
    element(
      "div",
      { class: "actions" },
      submit,
      close === null ? null : element("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
    ),
  );

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    replace(message, element("p", { class: "muted", role: "status" }, "Asking the server …"));
    try {
      const answer = await put(
        { api, state, bundle, current, ensure },
        controls.name.value,
        specOf(controls, bundle, current),
      );
      replace(message);
      if (answer !== null) {
        await state.refresh();
        onDone(answer);
      }
    } catch (error) {
      if (error.status === 412 && onConflict !== null) {
        onConflict(error);
      } else {
        replace(message, stoppedOrRefused(api, error, { title: titleOf(error) }));
      }
    } finally {
      submit.disabled = false;
    }
  });
  return form;
}

/** The answer of the server; null when the user thought better of it. */
async function put({ api, state, bundle, current, ensure }, name, spec) {
  const existing = current ?? (await profileNamed(state, name));
  if (existing !== null && current === null) {
    if (!(await confirmed(replacement(existing, bundle)))) {
      return null;
    }
    // Who may use it, and where it steers, must not change because nobody thought of it.
    spec.allowed_keys ??= existing.allowed_keys;
    spec.layers = isRestricted(existing, bundle) ? existing.layers : null;
  }
  await ensure?.();
  const headers = existing === null ? { "if-none-match": "*" } : { "if-match": `"${existing.generation}"` };
  return (await api.send("PUT", profilePath(name), { json: spec, headers })).data;
}

export function profilePath(name) {
  return `v1/steering/profiles/${encodeURIComponent(name)}`;
}

/** The profile as the server has it now; null when there is none of this name. */
async function profileNamed(state, name) {
  await state.refresh();
  if (state.problem !== null) {
    throw state.problem;
  }
  return state.profiles.find((profile) => profile.name === name) ?? null;
}

/** Whether a profile of this very bundle uses only some of its layers. */
function isRestricted(existing, bundle) {
  return existing.bundle === bundle.digest && existing.layers.length < bundle.layers.length;
}

function replacement(existing, bundle) {
  const layers = isRestricted(existing, bundle)
    ? ` It steers at some of its layers only, as before: ${listed(existing.layers)}.`
    : ` It will steer at all layers of the bundle: ${listed(bundle.layers)}.`;
  const keys =
    existing.allowed_keys === null ? "" : ` Only the keys ${listed(existing.allowed_keys)} may use it, as before.`;
  return {
    title: `Change the profile ${existing.name}?`,
    text:
      `It is there: version ${existing.generation}, bundle ${shortDigest(existing.bundle)}, strength ` +
      `${figure(existing.strength)}. New requests will get bundle ${shortDigest(bundle.digest)}; running ones end as they ` +
      `began, and a rollback brings the old version back.${layers}${keys}`,
    action: "Change it",
    isDangerous: false,
  };
}

function specOf(controls, bundle, current) {
  const keys = controls.keys.value
    .split(",")
    .map((key) => key.trim())
    .filter((key) => key !== "");
  // Layers are not in the form; a version that was restricted to some stays so.
  const layers = current?.bundle === bundle.digest ? current.history[0]?.settings?.layers : null;
  return {
    bundle: bundle.digest,
    strength: numberOf(controls.strength),
    maximum_strength: numberOf(controls.maximum),
    scope: controls.scope.value,
    exclude: controls.spans.filter((box) => box.checked).map((box) => box.value),
    description: descriptionOf(controls.description, bundle),
    allowed_keys: keys.length > 0 ? keys : null,
    layers: layers ?? null,
  };
}

/** Null where it is as the bundle has it: a bundle's may be longer than one that is typed. */
function descriptionOf({ value }, bundle) {
  // As text fields have line ends.
  return value === bundle.description.replace(/\r\n?/g, "\n") ? null : value.toWellFormed();
}

/** Null where nothing stands, which leaves it to the bundle. */
function numberOf(input) {
  return input.value === "" ? null : input.valueAsNumber;
}

function numberInput(name, value) {
  return element("input", { type: "number", name, step: "any", value: String(value), placeholder: "as in the bundle" });
}

/** What a refusal of a change means. */
export function titleOf(error) {
  return error.status === 412
    ? "Somebody else changed the profile meanwhile, so nothing was done. It is shown as it is now."
    : "The profile was not changed.";
}
