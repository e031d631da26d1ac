/* Tabs: arrow keys, Home and End move between them; the address names the open one, so that it can be linked to. */

/** `mount(panel)` fills a panel when it is first opened and resolves to { show() } for the next times, or to nothing. */
export function attachTabs(list, mount) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const views = new Map();

  function open(tab) {
    for (const other of tabs) {
      const isOpen = other === tab;
      other.setAttribute("aria-selected", String(isOpen));
      other.tabIndex = isOpen ? 0 : -1;
      panelOf(other).hidden = !isOpen;
    }
    const panel = panelOf(tab);
    if (views.has(tab)) {
      views.get(tab).then((view) => view?.show?.());
    } else {
      views.set(tab, mount(panel));
    }
  }

  function choose(tab) {
    open(tab);
    tab.focus();
    tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  }

  function named() {
    const name = location.hash.slice(1);
    return tabs.find((tab) => tab.getAttribute("aria-controls") === name);
  }

  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) {
      choose(tab);
    }
  });
  list.addEventListener("keydown", (event) => {
    const index = tabs.indexOf(document.activeElement);
    const moves = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 };
    if (index >= 0 && event.key in moves) {
      event.preventDefault();
      choose(tabs.at(moves[event.key] % tabs.length));
    }
  });
  window.addEventListener("hashchange", () => {
    const tab = named();
    if (tab) {
      open(tab);
    }
  });
  open(named() ?? tabs[0]);
}

function panelOf(tab) {
  return document.getElementById(tab.getAttribute("aria-controls"));
}
