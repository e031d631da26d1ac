/* Adding a bundle: the server checks it first and keeps nothing, then it is added, and served if that is wanted. */

import { tableOf } from "../bundle/charts.js";
import { element, field, replace } from "../dom.js";
import { figure, listed, size } from "../format.js";
import { shortDigest } from "../numbers.js";
import { stoppedOrRefused } from "../refusal.js";
import { servedText } from "./bundle_actions.js";
import { profileForm } from "./profile_form.js";

const PATH = "v1/steering/bundles";

/** { node, show() }; `onChange` comes after every change. */
export function uploadCard(api, state, { onChange }) {
  const file = element("input", { type: "file", accept: ".safetensors", class: "unseen", id: "bundle-file" });
  const drop = element(
    "div",
    { class: "drop" },
    file,
    element("label", { for: "bundle-file", class: "button" }, "Choose a bundle"),
    element("span", { class: "muted" }, "or drop a .safetensors file here"),
  );
  const names = element("datalist", { id: "root-names" });
  const name = element("input", { list: "root-names", name: "path", autocomplete: "off", spellcheck: "false" });
  const check = element("button", { type: "submit" }, "Check it");
  const rootNote = element("p", { class: "hint" });
  const root = element(
    "form",
    { class: "stack tight" },
    element("div", { class: "row" }, field("Or a file in the server's folder of bundles", name), check),
    names,
    rootNote,
  );
  const place = element("div", { class: "stack" });
  const sending = element("div", { class: "stack tight" });
  const node = element(
    "section",
    { class: "card" },
    element("h2", {}, "Add a bundle"),
    element("p", { class: "muted" }, "The server checks it first and keeps nothing; you then decide."),
    drop,
    root,
    place,
    sending,
  );
  let stop = null;
  let asked = 0;

  async function show() {
    try {
      const { names: found, is_complete: isComplete } = await api.get("v1/steering/root");
      replace(
        names,
        found.map((each) => element("option", { value: each })),
      );
      const more = isComplete ? "" : " and more, which can be named too";
      rootNote.textContent =
        found.length > 0
          ? `${found.length} ${found.length === 1 ? "file is" : "files are"} there${more}.`
          : "The folder is empty.";
      name.disabled = check.disabled = false;
    } catch (error) {
      rootNote.textContent = error.message;
      name.disabled = check.disabled = true;
    }
  }

  /**
   * Send a bundle, or its name: to be checked, or, with the `digest` that was checked, to be added. What was sent before
   * is stopped; an AbortError says what that means.
   */
  async function send(source, digest = null) {
    stop?.abort();
    const mine = new AbortController();
    stop = mine;
    const path = `${PATH}?dry_run=${digest === null}`;
    const progress = progressOf(source);
    const button = element("button", { type: "button", class: "small", onclick: () => mine.abort() }, "Stop");
    replace(sending, progress.nodes, element("div", {}, button));
    try {
      if (source.file === undefined) {
        return (await api.send("POST", path, { json: { path: source.path }, signal: mine.signal })).data;
      }
      const headers = digest === null ? {} : { "x-steering-digest": digest };
      return (await api.upload(path, source.file, { headers, onProgress: progress.show, signal: mine.signal })).data;
    } catch (error) {
      if (error.name !== "AbortError") {
        throw error;
      }
      if (digest === null) {
        throw new DOMException("Stopped; the server kept nothing.", error.name);
      }
      // It may have had all of it before.
      onChange();
      throw new DOMException("Stopped; the server may have added it all the same.", error.name);
    } finally {
      if (mine === stop) {
        replace(sending);
      }
    }
  }

  async function dryRun(source) {
    const now = ++asked;
    replace(place);
    try {
      const checked = await send(source);
      if (now === asked) {
        replace(place, checkedNodes(source, checked));
      }
    } catch (error) {
      if (now === asked) {
        replace(place, stoppedOrRefused(api, error, { title: "The server does not take it." }));
      }
    }
  }

  function checkedNodes(source, checked) {
    const isThere = !checked.created;
    const onDone = (answer) => finished(servedText(answer));
    const onlyAdd = async () => {
      try {
        const added = await send(source, checked.digest);
        finished(`${added.name} (${shortDigest(added.digest)}) is added; no profile names it yet.`);
      } catch (error) {
        replace(place, stoppedOrRefused(api, error, { title: "The bundle was not added." }));
      }
    };
    const form = profileForm({
      api,
      state,
      bundle: checked,
      ensure: isThere ? null : () => send(source, checked.digest),
      action: isThere ? "Activate" : "Add and activate",
      onDone,
    });
    return [
      element(
        "div",
        { class: "notice good", role: "status" },
        element(
          "p",
          {},
          isThere
            ? "All checks passed. This bundle is on the server already."
            : "All checks passed. Nothing is kept yet.",
        ),
      ),
      element("h3", {}, checked.name),
      checked.description === "" ? null : element("p", {}, checked.description),
      summary(checked),
      element(
        "details",
        {},
        element("summary", {}, `${checked.checks.length} checks`),
        tableOf(
          { columns: ["Check", "Found"], rows: checked.checks.map((each) => [each.check, each.found]) },
          "Checks",
        ),
      ),
      form,
      isThere
        ? null
        : element(
            "div",
            {},
            element("button", { type: "button", class: "quiet", onclick: onlyAdd }, "Add it without a profile"),
          ),
    ];
  }

  function finished(text) {
    name.value = "";
    replace(place, element("p", { class: "notice good", role: "status" }, text));
    onChange();
  }

  file.addEventListener("change", () => {
    const [chosen] = file.files;
    // The same file may be chosen again, after it was changed.
    file.value = "";
    if (chosen !== undefined) {
      dryRun({ file: chosen });
    }
  });
  root.addEventListener("submit", (event) => {
    event.preventDefault();
    if (name.value !== "") {
      dryRun({ path: name.value });
    }
  });
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length > 0) {
      dryRun({ file: event.dataTransfer.files[0] });
    }
  });
  return { node, show };
}

function progressOf({ file }) {
  const said = element("p", { class: "hint", role: "status" }, "The server checks it …");
  if (file === undefined) {
    return { nodes: [said] };
  }
  said.textContent = `Sending ${file.name}, ${size(file.size)}`;
  const bar = element("progress", { max: String(file.size), value: "0", "aria-label": `Sending ${file.name}` });
  return {
    nodes: [said, bar],
    show: (sent, total) => {
      bar.max = total;
      bar.value = sent;
      if (sent === total) {
        said.textContent = "Sent; the server checks it …";
      }
    },
  };
}

function summary(bundle) {
  const facts = [
    ["Digest", element("code", {}, shortDigest(bundle.digest))],
    ["Target", bundle.target],
    ["Acts at layers", listed(bundle.layers)],
    ["Kinds", listed(bundle.kinds)],
    ["Strength", `${figure(bundle.strength)}, at most ${figure(bundle.maximum_strength)}`],
    ["Licence", bundle.licence || "none is named"],
    ["Size", size(bundle.num_bytes)],
  ];
  return element(
    "dl",
    { class: "facts" },
    facts.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value))),
  );
}
