// SPDX-License-Identifier: Apache-2.0
// Requests to the server that the page is of, with the API key of this tab.

const KEY_ITEM = "xgdn.api_key";
let key = storedKey();

// Storage may be forbidden; the key then lives as long as the page.
function storedKey() {
  try {
    return sessionStorage.getItem(KEY_ITEM) ?? "";
  } catch {
    return "";
  }
}

export function hasKey() {
  return key !== "";
}

export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY_ITEM, value);
  } catch {
    // It is in `key`.
  }
}

/** An error that the server answered with, or sent within a stream (status 0). */
export class ServerError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const document = await response.json().catch(() => ({}));
  throw new ServerError(response.status, document.error ?? { message: `The server answered with status ${response.status}.` });
}

export async function getJson(path) {
  return (await ask(path)).json();
}

/** The documents of an event stream; throws when an event is an error, or the stream ends before its end. */
export async function* postForEvents(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data:")) continue; // comments keep the connection alive
    const data = line.slice("data:".length).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(0, event.error);
    yield event;
  }
  throw new Error("The connection ended before the answer did.");
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const [first, ...rest] = value.split("\n");
    pieces.push(first);
    for (const next of rest) {
      yield pieces.join("");
      pieces = [next];
    }
  }
}
