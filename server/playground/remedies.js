/* What may help against an error of an answer: a button, or nothing. */

import { element } from "./dom.js";
import { askForKey } from "./key.js";

/** `draft` and `form` belong to the view, `rerun` stops what still runs, and runs everything again. */
export function remedyOf(error, { api, draft, form, rerun }) {
  const button = (label, act) => element("button", { type: "button", class: "small", onclick: act }, label);
  if (error.status === 401 || error.status === 403) {
    return button("Use a key", async () => {
      if (await askForKey(api, error.message)) {
        rerun();
      }
    });
  }
  if (error.status === 400 && !draft.isPlain && /chat template/i.test(error.message)) {
    return button("Use plain completion", () => {
      draft.isPlain = true;
      form.show();
      rerun();
    });
  }
  if (error.status === 0 || error.status === 429 || error.status >= 500) {
    return button("Try again", rerun);
  }
  return null;
}
