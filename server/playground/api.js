/* The one place that talks to the server.
 *
 *   const api = new Api();
 *   await api.get("v1/steering/profiles", { signal })        parsed JSON of the answer
 *   await api.send("PUT", path, { json | body, headers, signal })
 *                                                            { status, headers, data }; data is null without JSON
 *   await api.pages("v1/steering/profiles", "profiles", { signal })
 *                                                            all entries of a list that comes in pages
 *   for await (const event of api.stream(path, body, { signal }))
 *                                                            JSON of the `data:` lines up to `[DONE]`
 *   await api.upload(path, file, { headers, onProgress(sent, total), signal })
 *                                                            like `send`, with the progress of a large body
 *
 * Paths are relative to the server ("v1/..."), so that the page works behind a proxy that adds a prefix. What the
 * server refuses, and what does not reach it, is an ApiError { status, code, message, retryAfterS }; status 0 means that
 * no answer came. An abort by `signal` is the usual AbortError.
 *
 * The key is in a private field of this object and nowhere else: `api.setKey(text or null)`, `api.hasKey`. Whoever
 * changes it makes the object send the event "key". Ask for one with `askForKey` of key.js.
 */

import { events } from "./events.js";

const ROOT = new URL("../", import.meta.url);

export class ApiError extends Error {
  constructor(status, code, message, retryAfterS = null) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

export class Api extends EventTarget {
  #key = null;

  get hasKey() {
    return this.#key !== null;
  }

  setKey(key) {
    this.#key = key || null;
    this.dispatchEvent(new Event("key"));
  }

  url(path) {
    return new URL(path, ROOT).href;
  }

  async get(path, options = {}) {
    return (await this.send("GET", path, options)).data;
  }

  async send(method, path, options = {}) {
    const response = await this.#fetch(method, path, options);
    return { status: response.status, headers: response.headers, data: await jsonOf(response) };
  }

  async pages(path, field, options = {}) {
    const items = [];
    const query = path.includes("?") ? "&" : "?";
    let cursor = null;
    do {
      const page = await this.get(cursor === null ? path : `${path}${query}cursor=${cursor}`, options);
      items.push(...page[field]);
      cursor = page.next ?? null;
    } while (cursor !== null);
    return items;
  }

  async *stream(path, body, options = {}) {
    const response = await this.#fetch("POST", path, { ...options, json: body });
    let isDone = false;
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") {
          // The end of the body comes next; to leave before it would count as an abort.
          isDone = true;
          continue;
        }
        const event = eventOf(data);
        if (event.error) {
          throw errorOf(event, event.error.status ?? 500);
        }
        yield event;
      }
    } catch (error) {
      throw asApiError(error);
    }
    if (!isDone) {
      throw new ApiError(0, "stream_cut", "The answer stopped before its end; the connection was closed.");
    }
  }

  upload(path, file, { headers = {}, onProgress = () => {}, signal } = {}) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      const abort = () => request.abort();
      request.open("POST", this.url(path));
      const type = { "content-type": "application/octet-stream" };
      for (const [name, value] of Object.entries({ ...type, ...this.#authorization(), ...headers })) {
        request.setRequestHeader(name, value);
      }
      request.upload.addEventListener("progress", (event) => onProgress(event.loaded, event.total));
      request.addEventListener("loadend", () => signal?.removeEventListener("abort", abort));
      request.addEventListener("abort", () => reject(new DOMException("The upload was stopped.", "AbortError")));
      request.addEventListener("error", () => reject(unreachable()));
      request.addEventListener("load", () => {
        const data = parsed(request.responseText);
        const found = new Headers({ etag: request.getResponseHeader("etag") ?? "" });
        if (request.status < 300) {
          resolve({ status: request.status, headers: found, data });
        } else {
          reject(errorOf(data, request.status, request.getResponseHeader("retry-after")));
        }
      });
      signal?.addEventListener("abort", abort);
      if (signal?.aborted) {
        abort();
      } else {
        request.send(file);
      }
    });
  }

  async #fetch(method, path, { json, body, headers = {}, signal }) {
    const type = json === undefined ? {} : { "content-type": "application/json" };
    let response;
    try {
      response = await fetch(this.url(path), {
        method,
        headers: { ...type, ...this.#authorization(), ...headers },
        body: json === undefined ? body : JSON.stringify(json),
        signal,
        credentials: "omit",
        cache: "no-store",
      });
    } catch (error) {
      throw asApiError(error);
    }
    if (!response.ok) {
      throw errorOf(await jsonOf(response), response.status, response.headers.get("retry-after"));
    }
    return response;
  }

  #authorization() {
    return this.#key === null ? {} : { authorization: `Bearer ${this.#key}` };
  }
}

function eventOf(data) {
  const event = parsed(data);
  if (event === null || typeof event !== "object") {
    throw new ApiError(0, "stream_invalid", "The answer stopped before its end; what came next is no JSON object.");
  }
  return event;
}

async function jsonOf(response) {
  try {
    return parsed(await response.text());
  } catch (error) {
    throw asApiError(error);
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Error of an answer in the OpenAI form, or of one of a proxy in front that answers in its own. */
function errorOf(data, status, retryAfter = null) {
  const { message, code } = data?.error ?? {};
  const retryAfterS = Number.parseFloat(retryAfter ?? "");
  return new ApiError(
    status,
    String(code ?? `http_${status}`),
    String(message ?? data?.detail ?? `The server answered with status ${status}.`),
    Number.isNaN(retryAfterS) ? null : retryAfterS,
  );
}

function asApiError(error) {
  return error instanceof ApiError || error.name === "AbortError" ? error : unreachable();
}

function unreachable() {
  return new ApiError(0, "unreachable", "No answer from the server; is it running, and is the network up?");
}
