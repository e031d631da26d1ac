/* Runs answers that belong together: at most so many at a time, drawn once per frame, ended by one stop. */

const TICK_MS = 500;

export class Runner {
  #draw;
  #controller = null;
  #frame = null;
  #ended = Promise.resolve();

  /** `draw()` shows everything as it is now. */
  constructor(draw) {
    this.#draw = draw;
  }

  get isRunning() {
    return this.#controller !== null;
  }

  /** Run `jobs`, functions that take a signal and never throw. A stop reaches those that wait for their turn too. */
  async run(jobs, atOnce) {
    this.#ended = this.#run(jobs, atOnce);
    await this.#ended;
  }

  async #run(jobs, atOnce) {
    const controller = new AbortController();
    this.#controller = controller;
    // Also while nothing comes, so that one sees how long it takes.
    const timer = setInterval(() => this.changed(), TICK_MS);
    const queue = [...jobs];
    const worker = async () => {
      while (queue.length > 0) {
        await queue.shift()(controller.signal);
      }
    };
    this.changed();
    await Promise.all(Array.from({ length: atOnce }, worker));
    clearInterval(timer);
    this.#controller = null;
    this.changed();
  }

  /** Stop what runs, and wait until it has ended. */
  async stop() {
    this.#controller?.abort();
    await this.#ended;
  }

  /** Something changed; several changes in one frame are drawn once. */
  changed() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.#draw();
    });
  }
}
