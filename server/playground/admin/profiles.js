/* The profiles of the server: what each means, its history, and ways to change it. */

import { confirmed } from "../dialog.js";
import { element, replace } from "../dom.js";
import { NONE, figure, listed, time } from "../format.js";
import { shortDigest } from "../numbers.js";
import { PickList } from "../picklist.js";
import { refusal } from "../refusal.js";
import { SCOPES } from "../request.js";
import { servedText } from "./bundle_actions.js";
import { askForDeletion, deletionPath } from "./deletion.js";
import { historyTable } from "./history.js";
import { profileForm, profilePath, titleOf } from "./profile_form.js";

const PAGE = 20;

/** { node, show(), clear() }: `show` brings it in step with the state; `showBundle(digest)` opens the page of a bundle, `onChange` comes after every change. */
export function profilesCard(api, state, { showBundle, onChange }) {
  const detail = element("div", { class: "stack", tabindex: "-1" });
  const said = element("div", {});
  const list = new PickList({
    label: "Profiles",
    textOf: (profile) => `${profile.name} ${profile.description} ${shortDigest(profile.bundle)}`,
    idOf: (profile) => profile.name,
    row: (profile) => [
      element("span", { class: "pick-name" }, profile.name),
      element("span", { class: "muted" }, `strength ${figure(profile.strength)}, version ${profile.generation}`),
    ],
    onPick: (profile) => {
      replace(said);
      choose(profile.name).then(() => detail.focus());
    },
  });
  const split = element("div", { class: "split inner" }, element("div", { class: "side" }, list.node), detail);
  const empty = element("p", { class: "muted" }, "No profile yet: add a bundle above and activate it.");
  const node = element("section", { class: "card" }, element("h2", {}, "Profiles"), said, empty, split);
  let chosen = null;
  // What the detail shows: it is not drawn again, and no form in it is lost, as long as it is still true.
  let shown = null;
  // Only the last question counts, whichever answer comes last.
  let asked = 0;

  function say(text) {
    replace(said, element("p", { class: "notice good", role: "status" }, text));
  }

  function sayRefused(error, title) {
    replace(said, refusal(api, error, { title }));
  }

  async function choose(name) {
    const now = ++asked;
    chosen = name;
    list.pick(name);
    try {
      const profile = await api.get(`${profilePath(name)}?limit=${PAGE}`);
      if (now === asked) {
        shown = profile;
        replace(detail, profileNodes(profile));
      }
    } catch (error) {
      if (now === asked) {
        shown = null;
        replace(detail, refusal(api, error, { retry: () => choose(name) }));
      }
    }
  }

  async function show() {
    list.show(state.profiles);
    empty.hidden = state.profiles.length > 0;
    split.hidden = state.profiles.length === 0;
    const profile = state.profiles.find(({ name }) => name === chosen) ?? state.profiles[0];
    if (profile === undefined) {
      chosen = shown = null;
      replace(detail);
    } else if (shown?.name !== profile.name || shown.generation !== profile.generation) {
      await choose(profile.name);
    }
  }

  function clear() {
    asked += 1;
    chosen = shown = null;
    list.show([]);
    replace(said);
    replace(detail);
  }

  /** Do something that changes a profile, and show how it is then, also where it went wrong. */
  async function change(what, done) {
    replace(said, element("p", { class: "muted", role: "status" }, "Asking the server …"));
    try {
      done((await what())?.data);
    } catch (error) {
      sayRefused(error, titleOf(error));
    }
    await state.refresh();
    onChange();
  }

  async function restore(profile, version) {
    const to = version === null ? "the last older version that says something else" : `version ${version.generation}`;
    const isSure = await confirmed({
      title: `Roll ${profile.name} back?`,
      text: `New requests will get ${to} in place of version ${profile.generation}; running ones end as they began. It can be undone.`,
      action: "Roll back",
    });
    if (isSure) {
      const headers = { "if-match": `"${profile.generation}"` };
      const json = { to: version?.generation ?? null };
      await change(
        () => api.send("POST", `${profilePath(profile.name)}/rollback`, { json, headers }),
        (answer) => say(servedText(answer)),
      );
    }
  }

  async function remove(profile) {
    const asked = await askForDeletion({
      title: `Delete the profile ${profile.name}?`,
      text: "New requests that name it are refused; running ones end as they began. Its bundle and its history stay.",
      action: "Delete the profile",
    });
    if (asked !== null) {
      const headers = { "if-match": `"${profile.generation}"` };
      const path = deletionPath(profilePath(profile.name), asked);
      await change(
        () => api.send("DELETE", path, { headers }),
        () => sayDeleted(profile.name),
      );
    }
  }

  function sayDeleted(name) {
    const undo = () => {
      chosen = name;
      change(
        () => api.send("POST", `${profilePath(name)}/rollback`, { json: { to: null } }),
        (answer) => say(servedText(answer)),
      );
    };
    replace(
      said,
      element(
        "div",
        { class: "notice good", role: "status" },
        element("p", {}, `${name} is deleted.`),
        element("button", { type: "button", class: "small", onclick: undo }, "Bring it back"),
      ),
    );
  }

  function profileNodes(profile) {
    const place = element("div", {});
    const edit = async () => {
      const bundle = await api.get(`v1/steering/bundles/${profile.bundle}`);
      const onDone = (answer) => {
        say(servedText(answer));
        onChange();
      };
      const onConflict = (error) => {
        sayRefused(error, titleOf(error));
        state.refresh();
      };
      const close = () => replace(place);
      const action = "Save as a new version";
      replace(place, profileForm({ api, state, bundle, current: profile, action, onDone, onConflict, close }));
      place.querySelector("input:not([readonly])").focus();
    };
    const more = (before) => api.get(`${profilePath(profile.name)}?limit=${PAGE}&before=${before}`);
    const button = (label, onclick, attributes = {}) =>
      element("button", { type: "button", onclick, ...attributes }, label);
    return [
      element("h3", {}, profile.name),
      profile.description === "" ? null : element("p", {}, profile.description),
      factList(profile),
      element(
        "div",
        { class: "actions" },
        button("Change", () => edit().catch((error) => sayRefused(error, "The profile cannot be changed now."))),
        button("Roll back", () => restore(profile, null), { disabled: profile.history.length < 2 }),
        button("Show the bundle", () => showBundle(profile.bundle)),
        button("Delete", () => remove(profile), { class: "danger" }),
      ),
      place,
      element("h4", {}, "History"),
      historyTable(profile, { more, restore: (version) => restore(profile, version) }),
    ];
  }

  return { node, show, clear };
}

function factList(profile) {
  const facts = [
    ["Strength", `${figure(profile.strength)}, at most ${figure(profile.maximum_strength)}`],
    ["Steers", SCOPES[profile.scope] ?? profile.scope],
    ["Layers", listed(profile.layers)],
    ["Leaves out", listed(profile.exclude.map((span) => span.replaceAll("_", " ")))],
    ["Bundle", element("code", {}, shortDigest(profile.bundle))],
    ["Changed", `${time(profile.changed_at)} by ${profile.changed_by ?? NONE}`],
    ["May be used by", profile.allowed_keys === null ? "all keys" : listed(profile.allowed_keys)],
  ];
  return element(
    "dl",
    { class: "facts" },
    facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}
