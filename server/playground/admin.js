/* The view "Admin": change what the server steers with, and see who did. Needs a key of the role write. */

import { accessCard } from "./admin/access.js";
import { auditCard } from "./admin/audit.js";
import { profilesCard } from "./admin/profiles.js";
import { statusCard } from "./admin/status.js";
import { uploadCard } from "./admin/upload.js";
import { element } from "./dom.js";
import { needsKey, refusal } from "./refusal.js";

export function mount(root, api, state) {
  const onChange = () => {
    status.show();
    audit.show();
    upload.show();
  };
  const showBundle = (digest) => {
    state.bundle = digest;
    document.getElementById("tab-bundles").click();
  };
  const access = accessCard(api);
  const upload = uploadCard(api, state, { onChange });
  const profiles = profilesCard(api, state, { showBundle, onChange });
  const status = statusCard(api);
  const audit = auditCard(api);
  const rest = element("div", { class: "stack", hidden: true }, upload.node, profiles.node, status.node, audit.node);
  root.append(element("div", { class: "stack" }, access.node, rest));
  let asked = 0;

  /** What a key showed is gone with it. */
  function clear() {
    rest.hidden = true;
    for (const card of [profiles, status, audit]) {
      card.clear();
    }
  }

  /** See whether the key opens anything, and show what it does. */
  async function load() {
    const now = ++asked;
    try {
      await api.get("v1/steering/status");
      if (now !== asked) {
        return;
      }
      access.show(null);
      rest.hidden = false;
      await Promise.all([upload.show(), state.refresh(), status.show(), audit.show()]);
    } catch (error) {
      if (now === asked) {
        rest.hidden = true;
        if (needsKey(error)) {
          clear();
        }
        // Without a key there is nothing wrong yet.
        access.show(
          needsKey(error) && !api.hasKey ? null : refusal(api, error, { retry: needsKey(error) ? null : load }),
        );
      }
    }
  }

  api.addEventListener("key", () => {
    if (!api.hasKey) {
      clear();
    }
    load();
  });
  state.addEventListener("change", () => rest.hidden || profiles.show());
  access.show(null);
  load();
  return { show: load };
}
