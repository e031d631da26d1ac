/* A list to pick from, also a long one: a filter, and a page of rows at a time.
 *
 *   const list = new PickList({ label, textOf(item), idOf(item), row(item), onPick(item) })
 *   list.node, list.show(items), list.pick(id)      `pick` marks an item, it does not call `onPick`
 */

import { element, field, replace } from "./dom.js";

const PAGE = 50;
const FILTER_FROM = 8;

export class PickList {
  #options;
  #items = [];
  #picked = null;
  #numShown = PAGE;
  #filter = element("input", { type: "search", placeholder: "Name or description", autocomplete: "off" });
  #filterField;
  #said = element("p", { class: "hint", role: "status" });
  #rows;
  #more = element("button", { type: "button", class: "small" });

  constructor(options) {
    this.#options = options;
    this.#rows = element("ul", { class: "picks", "aria-label": options.label });
    this.#filterField = field("Filter", this.#filter);
    this.node = element("div", { class: "stack" }, this.#filterField, this.#rows, this.#said, this.#more);
    this.#filter.addEventListener("input", () => {
      this.#numShown = PAGE;
      this.#draw();
    });
    this.#more.addEventListener("click", () => {
      const first = this.#numShown;
      this.#numShown += PAGE;
      this.#draw();
      this.#rows.children[first]?.querySelector("button").focus();
    });
  }

  show(items) {
    this.#items = items;
    this.#draw();
  }

  pick(id) {
    this.#picked = id;
    for (const button of this.#rows.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.id === id));
    }
  }

  #draw() {
    const { textOf, idOf, row, onPick } = this.#options;
    const words = this.#filter.value.trim().toLowerCase().split(/\s+/);
    const found = this.#items.filter((item) => {
      const text = textOf(item).toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const shown = found.slice(0, this.#numShown);
    const left = found.length - shown.length;
    this.#filterField.hidden = this.#items.length < FILTER_FROM;
    replace(
      this.#rows,
      shown.map((item) =>
        element(
          "li",
          {},
          element(
            "button",
            { type: "button", class: "pick", "data-id": idOf(item), onclick: () => onPick(item) },
            row(item),
          ),
        ),
      ),
    );
    this.pick(this.#picked);
    this.#said.textContent = found.length < this.#items.length ? `${found.length} of ${this.#items.length} match.` : "";
    this.#said.hidden = this.#said.textContent === "";
    this.#more.hidden = left === 0;
    this.#more.textContent = `Show ${Math.min(left, PAGE)} more of ${left}`;
  }
}
