/* Choosing profiles, each with its strength and scope. */

import { element, field, freshId, replace } from "./dom.js";
import { countText } from "./numbers.js";
import { SCOPES } from "./request.js";
import { strengthControl } from "./strength.js";

const FILTER_FROM = 20;
const LONG_DESCRIPTION = 180;

/** A choice of profiles.
 *
 * Returns { node, chosen(), check() }: `chosen` lists { name, strength, scope }, `check` says whether all strengths are
 * valid and shows which is not.
 */
export function profilePicker(state, api) {
  const rows = new Map();
  const list = element("ul", { class: "chosen", "aria-label": "Chosen profiles" });
  const said = element("p", { class: "hint", role: "status" });
  const filter = element("input", { type: "search", placeholder: "Name or description" });
  const filterField = field("Filter", filter);
  const select = element("select", {});
  const selectField = field("Add a profile", select);
  const empty = element("div", {});
  const node = element(
    "fieldset",
    { class: "stack picker" },
    element("legend", { class: "label" }, "Profiles"),
    list,
    empty,
    filterField,
    selectField,
    said,
  );
  let isTouched = false;

  function add(profile) {
    const row = profileRow(profile, rows.get(profile.name), () => {
      isTouched = true;
      rows.delete(profile.name);
      row.node.remove();
      offer();
      (select.options.length > 1 ? select : node.querySelector("button, input"))?.focus();
      said.textContent = `${profile.name} was removed.`;
    });
    rows.get(profile.name)?.node.replaceWith(row.node);
    rows.set(profile.name, row);
    if (!row.node.isConnected) {
      list.append(row.node);
    }
  }

  function offer() {
    const words = filter.value.trim().toLowerCase().split(/\s+/);
    const free = state.profiles.filter(({ name }) => !rows.has(name));
    const offered = free.filter(({ name, description }) => {
      const text = `${name} ${description}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const options = offered.map((profile) => element("option", { value: profile.name }, profile.name));
    const title = offered.length === free.length ? "Choose" : `Choose, ${countText(offered.length, "match")}`;
    replace(select, element("option", { value: "" }, `${title} \u2026`), options);
    filterField.hidden = free.length < FILTER_FROM;
    selectField.hidden = free.length === 0;
    list.hidden = rows.size === 0;
    empty.hidden = rows.size > 0;
    replace(empty, rows.size > 0 ? null : emptyState(state, api));
  }

  /** Drop what the server no longer has, and show what it has anew. */
  function repair() {
    const gone = [...rows.keys()].filter((name) => !state.profiles.some((profile) => profile.name === name));
    if (state.problem === null) {
      for (const name of gone) {
        rows.get(name).node.remove();
        rows.delete(name);
      }
      if (gone.length > 0) {
        // What takes its place is for the user to say.
        isTouched = true;
        const what = gone.length === 1 ? "is no longer on the server and was" : "are no longer on the server and were";
        said.textContent = `${gone.join(", ")} ${what} removed here.`;
      }
      for (const profile of state.profiles) {
        if (rows.has(profile.name) && rows.get(profile.name).generation !== profile.generation) {
          add(profile);
        }
      }
      if (!isTouched && rows.size === 0 && state.profiles.length > 0) {
        add(state.profiles[0]);
      }
    }
    offer();
  }

  select.addEventListener("change", () => {
    const profile = state.profiles.find(({ name }) => name === select.value);
    if (profile) {
      isTouched = true;
      add(profile);
      offer();
      said.textContent = "";
      rows.get(profile.name).node.querySelector("input[type=range]").focus();
    }
  });
  filter.addEventListener("input", offer);
  filter.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      // It would begin a run of the form around.
      event.preventDefault();
    }
  });
  state.addEventListener("change", repair);
  repair();
  return {
    node,
    chosen: () => [...rows.values()].map((row) => row.value()),
    check: () => [...rows.values()].every((row) => row.check()),
  };
}

/** What to do when no profile is chosen. */
function emptyState(state, api) {
  if (!state.isLoaded) {
    return element("p", { class: "muted" }, "Asking the server for its profiles \u2026");
  }
  if (state.problem !== null) {
    return element("p", { class: "muted" }, "The server's profiles are not known yet.");
  }
  if (state.profiles.length > 0) {
    return element("p", { class: "muted" }, "No profile chosen: both answers would be the same. Add one below.");
  }
  return element(
    "div",
    { class: "empty" },
    element("h3", {}, "No profile yet"),
    element(
      "p",
      {},
      "A profile names a bundle of steering vectors. Add one in the ",
      element("a", { href: "#admin" }, "Admin tab"),
      ", or from a terminal:",
    ),
    element("code", {}, `expertsteer push FILE.safetensors --profile NAME --server ${api.url("").replace(/\/$/, "")}`),
  );
}

function profileRow(profile, before, remove) {
  const kept = before?.value();
  const limit = profile.maximum_strength;
  let strength = Math.min(Math.max(kept?.strength ?? profile.strength, -limit), limit);
  const scope = element(
    "select",
    {},
    Object.entries(SCOPES).map(([name, text]) => element("option", { value: name }, `${name} \u2013 ${text}`)),
  );
  scope.value = kept?.scope ?? profile.scope;
  const heading = freshId("profile");
  const control = strengthControl(profile, strength, (value) => {
    strength = value;
  });
  const node = element(
    "li",
    { class: "profile", role: "group", "aria-labelledby": heading },
    element(
      "div",
      { class: "profile-head" },
      element("h3", { id: heading }, profile.name),
      element(
        "button",
        { type: "button", class: "quiet small", "aria-label": `Remove ${profile.name}`, onclick: remove },
        "Remove",
      ),
    ),
    about(profile.description),
    control,
    field("Scope", scope),
  );
  return {
    node,
    generation: profile.generation,
    value: () => ({ name: profile.name, strength, scope: scope.value }),
    check: () => node.querySelector("input[type=number]").reportValidity(),
  };
}

function about(description) {
  if (description.length <= LONG_DESCRIPTION) {
    return description === "" ? null : element("p", { class: "about", dir: "auto" }, description);
  }
  const cut = description.lastIndexOf(" ", LONG_DESCRIPTION);
  const start = description.slice(0, cut > 0 ? cut : LONG_DESCRIPTION).toWellFormed();
  return element(
    "details",
    { class: "about" },
    element("summary", { dir: "auto" }, `${start} \u2026`),
    element("p", { dir: "auto" }, description),
  );
}
