/* One answer while it streams: its text, how fast it comes, and its receipt. */

const AT_ONCE_MS = 10;

export class Answer {
  #onChange;
  #numPieces = 0;

  /** `onChange()` is called after each change. */
  constructor(onChange) {
    this.#onChange = onChange;
    // queued, waiting, writing, done, stopped or failed.
    this.state = "queued";
    this.text = "";
    this.reasoning = "";
    this.receipts = [];
    this.error = null;
    this.finishReason = null;
    this.usage = null;
    this.startedMs = null;
    this.firstMs = null;
    this.lastMs = null;
  }

  get isOver() {
    return ["done", "stopped", "failed"].includes(this.state);
  }

  get isRunning() {
    return ["waiting", "writing"].includes(this.state);
  }

  /** Tokens written: as the server counted them at the end, before that the pieces that came. */
  get numTokens() {
    return this.usage?.completion_tokens ?? this.#numPieces;
  }

  get waitedMs() {
    return this.startedMs === null ? 0 : performance.now() - this.startedMs;
  }

  get firstTokenMs() {
    return this.firstMs === null ? null : this.firstMs - this.startedMs;
  }

  /** Of the tokens after the first one; null while there is no second one, and when all came at once, as by a proxy. */
  get tokensPerS() {
    const elapsedMs = this.lastMs - this.firstMs;
    return this.numTokens > 1 && elapsedMs > AT_ONCE_MS ? ((this.numTokens - 1) * 1000) / elapsedMs : null;
  }

  /** Ask for it and read it to its end; never throws. */
  async run(api, path, body, signal) {
    this.startedMs = performance.now();
    this.#become("waiting");
    try {
      for await (const event of api.stream(path, body, { signal })) {
        this.#take(event);
      }
      this.#become("done");
    } catch (error) {
      if (error.name === "AbortError") {
        this.stop();
      } else {
        this.error = error;
        this.#become("failed");
      }
    }
  }

  /** Note that nobody waits for it any more. */
  stop() {
    this.#become("stopped");
  }

  #take(event) {
    const choice = event.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    const thought = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
    if (piece !== "" || thought !== "") {
      this.text += piece;
      this.reasoning += thought;
      this.#numPieces += 1;
      this.lastMs = performance.now();
      this.firstMs ??= this.lastMs;
      this.state = "writing";
    }
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    this.usage = event.usage ?? this.usage;
    this.receipts = event.steering ? [event.steering].flat() : this.receipts;
    this.#onChange();
  }

  #become(state) {
    this.state = state;
    this.#onChange();
  }
}
