/* The view "Bundles": which there are, and what the chosen one holds. */

import { showBundle } from "./bundle/detail.js";
import { element, replace } from "./dom.js";
import { shortDigest } from "./numbers.js";
import { PickList } from "./picklist.js";
import { prose } from "./prose.js";
import { keyNeeded, needsKey, refusal } from "./refusal.js";

export function mount(root, api, state) {
  const said = element("div", {});
  const detail = element("div", { class: "stack", tabindex: "-1" });
  const list = new PickList({
    label: "Bundles",
    textOf: (bundle) => `${bundle.name} ${bundle.description} ${shortDigest(bundle.digest)} ${bundle.target}`,
    idOf: (bundle) => bundle.digest,
    row: rowOf,
    onPick: (bundle) => {
      replace(said);
      choose(bundle).then(() => detail.focus());
    },
  });
  const split = element(
    "div",
    { class: "split" },
    element("div", { class: "card side" }, element("h2", {}, "Bundles"), list.node),
    element("div", { class: "stack" }, said, detail),
  );
  let digest = null;
  // The list's entry of what the detail shows: it is not drawn again, and no form in it is lost, while that is true.
  let shown = null;
  // Only the last question counts, whichever answer comes last.
  let asked = 0;

  async function load() {
    const now = ++asked;
    if (!split.isConnected) {
      replace(root, element("p", { class: "muted", role: "status" }, "Loading bundles …"));
    }
    try {
      const bundles = await api.pages("v1/steering/bundles?limit=200", "bundles");
      if (now !== asked) {
        return;
      }
      if (bundles.length === 0) {
        replace(root, emptyState());
        return;
      }
      list.show(bundles);
      replace(root, split);
      const wanted = state.bundle ?? digest;
      state.bundle = null;
      const bundle = bundles.find((each) => each.digest === wanted) ?? bundles[0];
      if (!isShown(bundle)) {
        await choose(bundle);
      }
    } catch (error) {
      if (now === asked) {
        const isFirst = needsKey(error) && !api.hasKey;
        const why = { title: "The bundles cannot be shown.", retry: load };
        replace(root, isFirst ? keyNeeded(api, error, "Bundles need a key") : refusal(api, error, why));
      }
    }
  }

  async function choose(bundle) {
    digest = bundle.digest;
    shown = JSON.stringify(bundle);
    list.pick(digest);
    const isWanted = () => digest === bundle.digest;
    const onChange = (text) => {
      replace(said, element("p", { class: "notice good", role: "status" }, text));
      return reload();
    };
    await showBundle(detail, api, state, digest, { isWanted, retry: load, onChange });
  }

  function isShown(bundle) {
    return digest === bundle.digest && detail.dataset.digest === digest && shown === JSON.stringify(bundle);
  }

  function reload() {
    shown = null;
    return load();
  }

  api.addEventListener("key", reload);
  load();
  return { show: load };
}

function rowOf(bundle) {
  const profiles = new Set(bundle.used_by.filter((use) => use.is_current).map((use) => use.profile));
  return [
    element("span", { class: "pick-name" }, bundle.name),
    element("code", { class: "muted" }, shortDigest(bundle.digest)),
    profiles.size > 0
      ? element("span", { class: "badge accent" }, profiles.size === 1 ? [...profiles][0] : `${profiles.size} profiles`)
      : element("span", { class: "badge" }, "not in use"),
    bundle.is_draining ? element("span", { class: "badge warn" }, "on its way out") : null,
  ];
}

function emptyState() {
  return element(
    "div",
    { class: "empty" },
    element("h2", {}, "No bundles yet"),
    element(
      "p",
      {},
      prose(
        "A bundle holds what steers the model. Add one in the tab Admin, with `expertsteer push FILE --profile NAME`, or " +
          "start the server with `--steering-bundle FILE`.",
      ),
    ),
  );
}
