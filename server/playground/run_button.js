/* The button of a form that begins a run, and ends it while it goes on. */

import { element } from "./dom.js";

/** { node, draw() }: `draw` shows whether `runner` runs. The form's own submit begins a run. */
export function runButton(runner) {
  const node = element("button", { type: "submit", class: "primary" }, "Run");

  function draw() {
    node.textContent = runner.isRunning ? "Stop" : "Run";
    // As a submit button it would be pressed by Enter in a field of the form.
    node.type = runner.isRunning ? "button" : "submit";
  }

  node.addEventListener("click", (event) => {
    if (event.detail > 1) {
      // The second click of a double click must not stop what the first one began, nor begin what it stopped.
      event.preventDefault();
    } else if (node.type === "button") {
      runner.stop();
    }
  });
  return { node, draw };
}
