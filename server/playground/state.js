/* What all views share: the models and profiles that the server has, and which model is chosen.
 *
 *   state.models    ids of the models themselves, without the entries `<model>@<profile>`
 *   state.model     the chosen one, null before the first answer
 *   state.profiles  entries of GET v1/steering/profiles, by name
 *   state.draft     the request that Compare and Strengths show
 *   state.bundle    digest that the view Bundles shall show when it is opened next, null for the one it showed last
 *   state.problem   ApiError of the last refresh, null when it went well
 *   await state.refresh()   asks the server again; never throws, and ends when the newest answer is in
 *   state.addEventListener("change", ...)   after a refresh and when another model is chosen
 */

import { newDraft } from "./request.js";

export class State extends EventTarget {
  #api;
  #stop = null;
  #newest = null;

  constructor(api) {
    super();
    this.#api = api;
    this.models = [];
    this.model = null;
    this.profiles = [];
    this.draft = newDraft();
    this.problem = null;
    this.isLoaded = false;
    this.bundle = null;
  }

  choose(model) {
    this.model = model;
    this.dispatchEvent(new Event("change"));
  }

  async refresh() {
    // What was asked before may have another key, or be older than the change that this is about.
    this.#stop?.abort();
    this.#stop = new AbortController();
    this.#newest = this.#load(this.#stop.signal);
    let awaited;
    do {
      awaited = this.#newest;
      await awaited;
    } while (awaited !== this.#newest);
  }

  async #load(signal) {
    try {
      const [models, profiles] = await Promise.all([
        this.#api.get("v1/models", { signal }),
        this.#api.pages("v1/steering/profiles?limit=500", "profiles", { signal }),
      ]);
      if (signal.aborted) {
        return;
      }
      // Entries `<model>@<profile>` name the model as their parent.
      this.models = models.data.filter((card) => !card.parent || !card.id.includes("@")).map((card) => card.id);
      this.profiles = profiles;
      this.problem = null;
      if (!this.models.includes(this.model)) {
        this.model = this.models[0] ?? null;
      }
    } catch (error) {
      if (signal.aborted) {
        return;
      }
      this.problem = error;
    }
    this.isLoaded = true;
    this.dispatchEvent(new Event("change"));
  }
}
