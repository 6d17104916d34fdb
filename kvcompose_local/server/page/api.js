// The server's endpoints. All requests go to where the page came from.

/** What the server refused or could not do: ``status`` is HTTP's (0: it did not answer), ``retryAfter`` in seconds. */
export class Refusal extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

let askForKey = async () => null;
let asking = null;

/** Who is asked for the API key when the server wants one: ``ask(wasWrong)`` resolves to the key or null. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

async function fetched(path, { mayAsk = true, ...options }, key = localStorage.getItem("key")) {
  let response;
  try {
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is it still running?");
  }
  if (response.status === 401 && mayAsk) {
    const current = localStorage.getItem("key");
    if (current !== key && current) return fetched(path, options, current); // another request asked meanwhile
    asking ??= askForKey(Boolean(key)).finally(() => (asking = null));
    const given = await asking;
    if (given) {
      localStorage.setItem("key", given);
      return fetched(path, options, given);
    }
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON, or none of ours
  }
  return new Refusal(message, response.status, Number(response.headers.get("Retry-After")) || 0);
}

const get = async (path, options = {}) => (await fetched(path, options)).json();
const post = (path, body, options = {}) =>
  fetched(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    ...options,
  });
const chat = (id) => `/kvc/chats/${encodeURIComponent(id)}`;

/** mayAsk: whether the user is asked for a key. */
export const props = (mayAsk) => get("/props", { mayAsk });
export const keptChats = async () => (await get("/kvc/chats")).chats;
export const keptChat = (id) => get(chat(id));
export const forget = (id) => fetched(chat(id), { method: "DELETE" });
export const memory = (id, budget = null, signal = undefined) =>
  get(`${chat(id)}/memory${budget === null ? "" : `?budget=${budget}`}`, { signal });
export const pin = async (id, start, stop) => (await post(`${chat(id)}/pins`, { start, stop })).json();
export const unpin = async (id) => (await fetched(`${chat(id)}/pins`, { method: "DELETE" })).json();

/** The text of a file that was dropped: the server tells encodings and reads PDF. */
export async function textOf(file) {
  const path = `/kvc/text?name=${encodeURIComponent(file.name)}`;
  const response = await fetched(path, {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: file,
  });
  return (await response.json()).text;
}

/**
 * Ask for an answer. Yields {reading: [done, total]}, {waiting: n} and {chunk: object} as the server sends them; throws a
 * Refusal for what it refuses, also in the middle. Aborting ``signal`` hangs up, which stops the generation.
 */
export async function* answer(body, signal) {
  const response = await post(
    "/v1/chat/completions",
    { ...body, stream: true, stream_options: { include_usage: true } },
    { signal },
  );
  for await (const line of lines(response.body)) {
    if (line.startsWith(":")) {
      const [, what, first, second] = line.match(/^: (reading|waiting) (\d+)(?:\/(\d+))?/) ?? [];
      if (what === "reading") yield { reading: [Number(first), Number(second)] };
      if (what === "waiting") yield { waiting: Number(first) };
    } else if (line.startsWith("data:")) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(chunk.error.message, 500);
      yield { chunk };
    }
  }
  throw new Refusal("The connection broke before the answer ended.");
}

async function* lines(stream) {
  let rest = "";
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader(); // Safari's streams are no async iterators
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The connection broke before the answer ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
