/* The shell: tabs, model, key and theme.
 *
 * A view is a module with `mount(root, api, state)`, called when its tab is first opened; it may return { show() },
 * called each time the tab is opened again.
 */

import { Api } from "./api.js";
import { element, replace } from "./dom.js";
import { askForKey } from "./key.js";
import { State } from "./state.js";
import { attachTabs } from "./tabs.js";
import { attachTheme } from "./theme.js";

const VIEWS = {
  compare: () => import("./compare.js"),
  strengths: () => import("./grid.js"),
  bundles: () => import("./bundle.js"),
  admin: () => import("./admin.js"),
};

const api = new Api();
const state = new State(api);
const model = document.getElementById("model");
const onlyModel = document.getElementById("only-model");
const notice = document.getElementById("notice");
const keyButton = document.getElementById("key");

function showModels() {
  const cards = state.models.map((id) => element("option", { value: id, selected: id === state.model }, id));
  replace(model, cards);
  model.hidden = cards.length < 2;
  onlyModel.hidden = !model.hidden;
  onlyModel.textContent = state.model ?? "none yet";
}

function showProblem() {
  const { problem } = state;
  notice.hidden = problem === null;
  if (problem === null) {
    return;
  }
  const needsKey = problem.status === 401 || problem.status === 403;
  const action = needsKey
    ? element("button", { type: "button", onclick: useKey }, "Use a key")
    : element("button", { type: "button", onclick: () => state.refresh() }, "Try again");
  replace(notice, element("p", {}, problem.message), action);
}

function showKey() {
  keyButton.textContent = api.hasKey ? "Forget key" : "Set key";
}

async function useKey() {
  const { problem } = state;
  await askForKey(
    api,
    problem?.message ?? "For servers that ask for one, and for what the tabs Bundles and Admin need.",
  );
}

keyButton.addEventListener("click", () => (api.hasKey ? api.setKey(null) : useKey()));
model.addEventListener("change", () => state.choose(model.value));
state.addEventListener("change", () => {
  showModels();
  showProblem();
});
api.addEventListener("key", () => {
  showKey();
  state.refresh();
});

attachTheme(document.getElementById("theme"));
attachTabs(document.querySelector("[role=tablist]"), async (panel) => {
  try {
    return (await VIEWS[panel.id]()).mount(panel, api, state);
  } catch (error) {
    replace(
      panel,
      element("p", { class: "notice bad", role: "alert" }, "This view could not be loaded; reload the page."),
    );
    throw error;
  }
});
showModels();
state.refresh();
