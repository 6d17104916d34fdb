// A chat is a tree of messages: an edited question or another answer is a sibling, and nothing is ever overwritten.
// A message: {id, chat, parent, role: "user"|"assistant", content, reasoning, files: [{name, text}], made, …}.

/** The children of a message (of null: the first messages), oldest first. */
export function children(messages, parent) {
  const found = [...messages.values()].filter((message) => message.parent === parent);
  return found.sort((a, b) => a.made - b.made || (a.id < b.id ? -1 : 1));
}

/** The messages from the first to ``leaf``, which may be null. */
export function path(messages, leaf) {
  const found = [];
  const seen = new Set();
  for (let at = messages.get(leaf); at && !seen.has(at.id); at = messages.get(at.parent)) {
    seen.add(at.id);
    found.unshift(at);
  }
  return found;
}

/** The leaf reached from a message by its newest children; from null: by the newest first message. */
export function newestLeaf(messages, from) {
  let leaf = from;
  for (let next = children(messages, leaf).at(-1); next; next = children(messages, leaf).at(-1)) leaf = next.id;
  return leaf;
}

/** What the model is given for a message. It decides what is read again: change it, and every kept chat is. */
export function content(message) {
  const files = (message.files ?? []).map(({ name, text }) => {
    const fence = "`".repeat(Math.max(3, 1 + Math.max(0, ...[...text.matchAll(/`+/g)].map((run) => run[0].length))));
    return `${name}:\n${fence}\n${text.replace(/\n*$/, "")}\n${fence}\n\n`;
  });
  return files.join("") + message.content;
}

/** The messages of a request: the system prompt, where there is one, and the path. */
export function request(messages, leaf, system) {
  const turns = path(messages, leaf).map((message) => ({
    role: message.role,
    content: content(message),
    ...(message.reasoning ? { reasoning_content: message.reasoning } : {}),
  }));
  return system ? [{ role: "system", content: system }, ...turns] : turns;
}

/** A title: the beginning of the first question, or the name of its first file. */
export function titleOf(message) {
  const text = (message.content || message.files?.[0]?.name || "").replace(/\s+/g, " ").trim();
  return text.length > 60 ? `${text.slice(0, 59).trimEnd()}…` : text || "New chat";
}
