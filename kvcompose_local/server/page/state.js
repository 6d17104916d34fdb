// What this tab shows, and who wants to know when it changes.

import * as store from "./store.js";
import { children, newestLeaf, path } from "./tree.js";

/** chat: null before its first message is sent; settings: of the chat, or for the one to come; props: of the server. */
export const state = { chat: null, messages: new Map(), leaf: null, settings: {}, props: null, showsMemory: false };

const listeners = {};

/**
 * Names: "shown" (another chat, branch or message), "message" (one grew), "ended" (an answer did), "chats" (the list),
 * "props" (of the server, or settings), "problem" (a text).
 */
export function on(names, listener) {
  for (const name of names.split(" ")) (listeners[name] ??= []).push(listener);
}

export function tell(name, detail) {
  for (const listener of listeners[name] ?? []) listener(detail);
}

export const shownPath = () => path(state.messages, state.leaf);

/** The last answer of what is shown that the server keeps. */
export const keptAnswer = () => shownPath().findLast((message) => message.kept) ?? null;

/** The model that a chat with these settings is for, as the server tells of it: one that is not served any more is not. */
export const model = (settings = state.settings) => {
  const { props } = state;
  return (
    props?.models.find((found) => found.id === settings.model) ??
    props?.models.find((found) => found.id === props.default_model) ??
    null
  );
};

function defaults() {
  try {
    return JSON.parse(localStorage.getItem("settings")) ?? {};
  } catch {
    return {};
  }
}

export function setDefaults(settings) {
  localStorage.setItem("settings", JSON.stringify(settings));
}

function show(found) {
  Object.assign(state, found);
  history.replaceState(null, "", state.chat ? `#${state.chat.id}` : location.pathname);
  tell("shown");
}

export function newChat() {
  show({ chat: null, messages: new Map(), leaf: null, settings: defaults() });
}

/** Show a chat of the history; a new one where it is not there any more. */
export async function openChat(id) {
  const found = await store.load(id);
  if (!found) return newChat();
  const leaf = found.messages.has(found.chat.leaf) ? found.chat.leaf : newestLeaf(found.messages, null);
  return show({ ...found, leaf, settings: found.chat.settings });
}

/** The chat that is shown, in the history from now on. */
export async function begunChat(title) {
  if (!state.chat) {
    const chat = { id: store.newId(), title, used: Date.now(), leaf: null, settings: state.settings };
    state.chat = chat; // before the first wait: a second message must not begin a second chat
    await store.addChat(chat);
    history.replaceState(null, "", `#${chat.id}`);
    tell("chats");
  }
  return state.chat;
}

/** Show the branch that ends with a message. */
export async function showLeaf(id) {
  if (!state.messages.has(id)) return; // of a chat that is not shown any more
  state.leaf = id;
  tell("shown");
  await store.changeChat(state.chat.id, { leaf: id });
}

/** Show the sibling before (-1) or after (1) a message. */
export function showSibling(message, step) {
  const all = children(state.messages, message.parent);
  const sibling = all[all.findIndex((found) => found.id === message.id) + step];
  return sibling ? showLeaf(newestLeaf(state.messages, sibling.id)) : undefined;
}

/** A message of some chat has grown or is new: show it if that chat is shown. */
export function noteMessage(message) {
  if (state.chat?.id !== message.chat) return;
  const isKnown = state.messages.has(message.id);
  state.messages.set(message.id, message);
  tell(isKnown ? "message" : "shown", message);
}

export async function changeSettings(settings) {
  state.settings = settings;
  if (state.chat) {
    state.chat.settings = settings;
    await store.changeChat(state.chat.id, { settings });
  }
  tell("props");
}

// Another tab wrote. What is here is only added to: a question of this tab may be on its way to the disk.
store.subscribe(async ({ chat, message, deleted }) => {
  if (!message) tell("chats");
  if (chat !== state.chat?.id) return;
  if (message) return noteMessage(message);
  if (deleted) {
    if (state.leaf === deleted) state.leaf = state.messages.get(deleted)?.parent ?? null;
    state.messages.delete(deleted);
    return tell("shown");
  }
  const found = await store.load(chat);
  if (state.chat?.id !== chat) return;
  if (!found) return newChat(); // deleted
  state.chat = { ...found.chat, leaf: state.leaf };
  state.settings = found.chat.settings;
  const more = [...found.messages.values()].filter((message) => !state.messages.has(message.id));
  for (const message of more) state.messages.set(message.id, message);
  tell(more.length ? "shown" : "props");
});
