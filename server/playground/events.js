/* Server-sent events of a response body, whatever the borders of its chunks. */

/** Yield the data of each event; comments, other fields and an event that is cut off at the end are left out. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      yield* parser.push(value);
    }
  } finally {
    // Whoever stops reading also ends the request.
    reader.cancel().catch(() => {});
  }
}

/** Collects lines, which may end in LF, CR LF or CR, also where these are cut apart. */
export class EventParser {
  #rest = "";
  #data = [];
  #endedInReturn = false;

  push(text) {
    const found = [];
    if (this.#endedInReturn && text.startsWith("\n")) {
      text = text.slice(1);
    }
    if (text !== "") {
      this.#endedInReturn = text.endsWith("\r");
    }
    const lines = (this.#rest + text).split(/\r\n|\n|\r/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length > 0) {
          found.push(this.#data.join("\n"));
        }
        this.#data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      }
    }
    return found;
  }
}
