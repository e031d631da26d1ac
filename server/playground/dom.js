/* Elements made by DOM calls: the page's policy allows no markup in text, so what anybody writes stays text.
 *
 *   element("button", { type: "button", class: "primary", onclick: run, disabled: true }, "Run")
 *
 * Attributes: `on...` functions become listeners; true sets an attribute without a value; false, null and undefined
 * leave it out. Children: nodes, text, numbers, lists of those; null and undefined are left out. `svg` does the same for
 * drawings.
 */

const SVG = "http://www.w3.org/2000/svg";
let count = 0;

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Put children in the place of what a node holds. */
export function replace(node, ...children) {
  node.replaceChildren(...nodes(children));
  return node;
}

/** An id that no other element has, for labels. */
export function freshId(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

/** Bring what a run fills into view where it is below what can be seen, as on a narrow screen. */
export function showResults(node) {
  if (node.getBoundingClientRect().top > window.innerHeight * 0.75) {
    node.scrollIntoView({ block: "start" });
  }
}

/** Label, control and hint: `control` gets an id and is described by the hint. */
export function field(label, control, hint = null) {
  control.id ||= freshId("field");
  const note = hint === null ? null : element("p", { class: "hint", id: `${control.id}-hint` }, hint);
  if (note !== null) {
    control.setAttribute("aria-describedby", note.id);
  }
  return element("div", { class: "field" }, element("label", { for: control.id }, label), control, note);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on") && typeof value === "function") {
      node.addEventListener(name.slice(2), value);
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...nodes(children));
  return node;
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined);
}
