// Talks to the server that the page came from: every request carries the key, errors become sentences.

const KEY = "dist_lm.key"; // in sessionStorage: gone with the tab

/** What the server refused, or why there is no answer. */
export class ApiError extends Error {
  constructor(message, {status = 0, param = null, code = null} = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

export class Api {
  constructor() {
    try {
      this._key = sessionStorage.getItem(KEY) ?? "";
    } catch {
      this._key = ""; // storage is switched off: the key lives as long as the page
    }
  }

  get key() {
    return this._key;
  }

  set key(key) {
    this._key = key;
    try {
      if (key) sessionStorage.setItem(KEY, key);
      else sessionStorage.removeItem(KEY);
    } catch {
      // as above
    }
  }

  /** Returns the models: [{id, max_model_len}]. */
  async models() {
    return (await (await this._request("v1/models")).json()).data;
  }

  /** Yields the events of a stream. Throws an ApiError where the server refuses, or the stream breaks off. */
  async *events(path, body, signal) {
    const response = await this._request(path, {...body, stream: true, stream_options: {include_usage: true}}, signal);
    let isComplete = false;
    try {
      for await (const data of eventData(response.body)) {
        if (data === "[DONE]") {
          isComplete = true;
          break;
        }
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, {...event.error, status: 500});
        yield event;
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new ApiError(`The connection to the server broke off (${error.message}).`);
    }
    if (!isComplete) throw new ApiError("The stream ended before the answer was complete.");
  }

  async _request(path, body, signal) {
    const headers = {};
    if (body) headers["Content-Type"] = "application/json";
    if (this._key) headers.Authorization = `Bearer ${this._key}`;
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        method: body ? "POST" : "GET",
        headers,
        body: body && JSON.stringify(body),
        signal,
        cache: "no-store",
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is dist-lm serve still running?");
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

/** Returns the error of a response in words. */
async function refusal(response) {
  const status = response.status;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy may answer with a page of its own: the status says enough.
  }
  const message = error.message ?? `${status} ${response.statusText}`;
  const retryAfter = response.headers.get("Retry-After");
  const words = {
    401: "The server asks for a key: the one that was sent is missing or wrong.",
    413: "The conversation is longer than the server takes.",
    429: `The server is busy: ${message}.`,
    503: `The server cannot answer now: ${message}.`,
  };
  const advice = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  return new ApiError((words[status] ?? `The server refused: ${message}.`) + advice, {...error, status});
}

/** Yields the data of server-sent events; lines may be cut anywhere by the network. */
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      buffer += value;
      const lines = buffer.split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // the reader may have failed before, which is what the caller hears of
  }
}
