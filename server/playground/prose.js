/* Text with `code` in it, as nodes. */

import { element } from "./dom.js";

export function prose(text) {
  return text.split("`").map((part, index) => (index % 2 === 1 ? element("code", {}, part) : part));
}
