// Chats in IndexedDB. Each message is a record of its own with a random id, so two tabs that write to the same chat add
// branches and never overwrite each other; a chat's record holds only its title, its settings and which leaf was shown last.

const NAME = "kvcompose-local";
const channel = new BroadcastChannel(NAME);

let opened;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("chats", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("chat", "chat");
    };
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  return opened;
}

const done = (asked) =>
  new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });

/** Run ``work`` in one transaction; resolves to its result once everything is on disk. */
async function transaction(mode, work) {
  const db = await open();
  return new Promise((resolve, reject) => {
    const tx = db.transaction(["chats", "messages"], mode);
    let result;
    tx.oncomplete = () => resolve(result);
    tx.onabort = () => reject(tx.error ?? new Error("the history could not be written"));
    Promise.resolve(work(tx.objectStore("chats"), tx.objectStore("messages"))).then(
      (value) => (result = value),
      (error) => {
        reject(error);
        tx.abort();
      },
    );
  });
}

export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

/** All chats, the one used last first. */
export async function allChats() {
  const chats = await transaction("readonly", (chats) => done(chats.getAll()));
  return chats.sort((a, b) => b.used - a.used);
}

/** A chat and its messages as a Map by id, or null where it was deleted. */
export function load(id) {
  return transaction("readonly", async (chats, messages) => {
    const chat = await done(chats.get(id));
    const found = chat ? await done(messages.index("chat").getAll(id)) : [];
    return chat ? { chat, messages: new Map(found.map((message) => [message.id, message])) } : null;
  });
}

export async function addChat(chat) {
  await transaction("readwrite", (chats) => done(chats.add(chat)));
  channel.postMessage({ chat: chat.id });
}

/** Change fields of a chat that is still there. Returns it, or null. */
export async function changeChat(id, changes) {
  const changed = await transaction("readwrite", async (chats) => {
    const chat = await done(chats.get(id));
    if (!chat) return null;
    const changed = { ...chat, ...changes };
    await done(chats.put(changed));
    return changed;
  });
  channel.postMessage({ chat: id });
  return changed;
}

/** Write a message, new or grown, of a chat that is still there. Returns whether it is. */
export async function putMessage(message) {
  const written = await transaction("readwrite", async (chats, messages) => {
    if (!(await done(chats.getKey(message.chat)))) return false;
    await done(messages.put(message));
    return true;
  });
  channel.postMessage({ chat: message.chat, message });
  return written;
}

export async function deleteMessage(message) {
  await transaction("readwrite", (_chats, messages) => done(messages.delete(message.id)));
  channel.postMessage({ chat: message.chat, deleted: message.id });
}

/** Forget a chat. Returns the server's chats that no other chat here goes on with. */
export async function deleteChat(id) {
  const kept = await transaction("readwrite", async (chats, messages) => {
    const all = await done(messages.getAll());
    const of = (own) =>
      new Set(all.filter((message) => (message.chat === id) === own && message.kept).map((message) => message.kept));
    for (const message of all) if (message.chat === id) messages.delete(message.id);
    await done(chats.delete(id));
    const others = of(false);
    return [...of(true)].filter((name) => !others.has(name));
  });
  channel.postMessage({ chat: id });
  return kept;
}

/** The server's chats that messages here come from. */
export function keptIds() {
  return transaction("readonly", async (_chats, messages) => {
    const all = await done(messages.getAll());
    return new Set(all.map((message) => message.kept).filter(Boolean));
  });
}

/** What other tabs write: ``listener({chat, message?, deleted?})``, deleted being the id of a message. */
export function subscribe(listener) {
  channel.onmessage = (event) => listener(event.data);
}

// -- export and import ----------------------------------------------------------------------------------------------

const FORMAT = "kvcompose-local chats";

/** All chats (or those of ``ids``) as an object for JSON. */
export function exported(ids = null) {
  return transaction("readonly", async (chats, messages) => {
    const found = await done(chats.getAll());
    const all = await done(messages.getAll());
    const wanted = found.filter((chat) => ids === null || ids.includes(chat.id));
    return {
      format: FORMAT,
      version: 1,
      chats: wanted.map((chat) => ({ ...chat, messages: all.filter((m) => m.chat === chat.id) })),
    };
  });
}

/** Add the chats of an export; messages that are there already stay as they are. Returns the ids of its chats. */
export async function imported(data) {
  const found = check(data);
  await transaction("readwrite", async (chats, messages) => {
    for (const { messages: own, ...chat } of found) {
      if (!(await done(chats.getKey(chat.id)))) await done(chats.add(chat));
      for (const message of own) if (!(await done(messages.getKey(message.id)))) await done(messages.add(message));
    }
  });
  for (const chat of found) channel.postMessage({ chat: chat.id });
  return found.map((chat) => chat.id);
}

const isText = (value) => typeof value === "string";
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** The chats of an export with nothing but the fields that are known. Throws an Error, in one line, for what is none. */
function check(data) {
  if (Array.isArray(data?.messages) && data.format !== FORMAT) return [fromTurns(data)];
  if (!isObject(data) || data.format !== FORMAT || !Array.isArray(data.chats))
    throw new Error("this file holds no exported chats");
  if (data.version !== 1) throw new Error("these chats were exported by a newer version of the program");
  return data.chats.map((chat) => {
    if (!isObject(chat) || !isText(chat.id) || !isText(chat.title) || !Array.isArray(chat.messages))
      throw new Error("a chat of this file is damaged");
    const messages = chat.messages.map((message) => checkMessage(message, chat.id));
    return {
      id: chat.id,
      title: chat.title,
      used: Number(chat.used) || Date.now(),
      leaf: isText(chat.leaf) ? chat.leaf : null,
      settings: isObject(chat.settings) ? chat.settings : {},
      messages,
    };
  });
}

function checkMessage(message, chat) {
  const files = message?.files ?? [];
  const isSound =
    isObject(message) &&
    isText(message.id) &&
    isText(message.content) &&
    ["user", "assistant"].includes(message.role) &&
    (message.parent === null || isText(message.parent)) &&
    Array.isArray(files) &&
    files.every((file) => isObject(file) && isText(file.name) && isText(file.text));
  if (!isSound) throw new Error("a message of this file is damaged");
  const { id, parent, role, content } = message;
  const text = (name) => (isText(message[name]) ? { [name]: message[name] } : {});
  return {
    id,
    chat,
    parent,
    role,
    content,
    made: Number(message.made) || 0,
    files: files.map(({ name, text }) => ({ name, text })),
    ...text("reasoning"),
    ...text("state"),
    ...text("error"),
    ...text("model"),
    ...(isObject(message.figures) ? { figures: numbers(message.figures) } : {}),
  };
}

const numbers = (figures) => Object.fromEntries(Object.entries(figures).filter(([, value]) => Number.isFinite(value)));

/** A chat of {"messages": [{"role", "content"}], "model"?, "id"? of the server's}, as OpenAI's requests have it. */
function fromTurns(data) {
  const id = newId();
  const system = data.messages
    .filter((turn) => turn?.role === "system" && isText(turn.content))
    .map((turn) => turn.content)
    .join("\n\n");
  let parent = null;
  const messages = data.messages
    .filter((turn) => turn?.role !== "system")
    .map((turn, i) => {
      const message = checkMessage({ ...turn, id: newId(), parent, made: i, reasoning: turn?.reasoning_content }, id);
      parent = message.id;
      return message;
    });
  if (isText(data.id) && messages.length) messages.at(-1).kept = data.id;
  const title = messages[0]?.content.slice(0, 60) || "Imported chat";
  return {
    id,
    title,
    used: Date.now(),
    leaf: parent,
    settings: { ...(system ? { system } : {}), ...(isText(data.model) ? { model: data.model } : {}) },
    messages,
  };
}
