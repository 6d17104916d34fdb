// Answers on their way. One goes on when another chat is shown; what came is saved every second.

import * as api from "./api.js";
import { announce } from "./dom.js";
import { begunChat, model, noteMessage, showLeaf, state, tell } from "./state.js";
import * as store from "./store.js";
import { request, titleOf } from "./tree.js";

const SAVE_EVERY_MS = 1000;
const running = new Map(); // chat id → {message, controller, progress}

export const runOf = (chatId) => running.get(chatId) ?? null;
export const isRunning = (message) => running.get(message.chat)?.message.id === message.id;

/** A message that another tab, or one that was closed, left unfinished. */
export const isInterrupted = (message) =>
  message.state === "running" && !isRunning(message) && Date.now() - (message.saved ?? 0) > 5 * SAVE_EVERY_MS;

export function stop() {
  running.get(state.chat?.id)?.controller.abort();
}

/** Ask a question after ``parent`` (null: the first), and have it answered. */
export async function ask(parent, content, files) {
  const question = { id: store.newId(), parent, role: "user", content, files, made: Date.now() };
  const { messages, settings } = state; // another chat may be shown before this one is on disk
  const chat = await begunChat(titleOf(question));
  question.chat = chat.id;
  messages.set(question.id, question);
  await store.putMessage(question);
  await showLeaf(question.id);
  return answer(question, { chat, messages, settings });
}

/** Have a question answered, once more where it was already. */
export async function answer(question, { chat, messages, settings } = state) {
  if (running.has(chat.id)) return;
  const { system, model: _wanted, ...options } = settings;
  const used = model(settings)?.id;
  const message = {
    id: store.newId(),
    chat: chat.id,
    parent: question.id,
    role: "assistant",
    content: "",
    reasoning: "",
    made: Date.now(),
    state: "running",
    ...(used ? { model: used } : {}),
  };
  const run = { message, controller: new AbortController(), progress: null, began: performance.now() };
  running.set(chat.id, run);
  messages.set(message.id, message);
  try {
    await save(message);
    await showLeaf(message.id);
    announce("The model answers.");
    const body = { model: used, messages: request(messages, question.id, system), ...options };
    await follow(run, body);
    message.state = message.state === "running" ? "done" : message.state;
  } catch (error) {
    if (error.name === "AbortError") message.state = "stopped";
    else Object.assign(message, { state: "failed", error: error.message });
  } finally {
    running.delete(chat.id);
  }
  if (message.error) announce(message.error);
  await save(message);
  await store.changeChat(chat.id, { used: Date.now() });
  noteMessage(message);
  tell("chats");
  tell("ended", message);
}

async function follow(run, body) {
  const { message } = run;
  let saved = performance.now();
  for await (const { reading, waiting, chunk } of api.answer(body, run.controller.signal)) {
    run.progress = reading ? { reading } : waiting !== undefined ? { waiting } : null;
    if (chunk) take(chunk, run);
    if (performance.now() - saved > SAVE_EVERY_MS) {
      saved = performance.now();
      save(message);
    }
    noteMessage(message);
  }
}

function take(chunk, run) {
  const { message } = run;
  const [choice] = chunk.choices ?? [];
  const { content, reasoning_content: reasoning } = choice?.delta ?? {};
  if (content || reasoning) {
    run.first ??= performance.now();
    run.pieces = (run.pieces ?? 0) + 1;
  }
  if (reasoning) message.reasoning += reasoning;
  if (content) {
    message.thought ??= message.reasoning ? performance.now() - run.first : undefined;
    message.content += content;
  }
  if (choice?.finish_reason === "length") message.state = "length";
  if (chunk.kvc) {
    message.kept = chunk.kvc.chat;
    message.figures = { ...message.figures, cached: chunk.kvc.cached, read: chunk.kvc.read, reread: chunk.kvc.reread };
  }
  if (chunk.usage)
    message.figures = { ...message.figures, total: chunk.usage.total_tokens, generated: chunk.usage.completion_tokens };
  if (chunk.timings) {
    const { predicted_n: generated, predicted_per_second: speed, compactions } = chunk.timings;
    message.figures = { ...message.figures, generated, speed, compactions };
  }
}

/** Tokens a second so far, of a run. */
export const speedOf = (run) => (run.pieces > 4 ? (1000 * (run.pieces - 1)) / (performance.now() - run.first) : 0);

function save(message) {
  message.saved = Date.now();
  return store.putMessage({ ...message });
}

/** Answer a question again where an answer failed: a failure without a word leaves no branch. */
export async function retry(failed) {
  const question = state.messages.get(failed.parent);
  if (!failed.content && !failed.reasoning) {
    state.messages.delete(failed.id);
    await store.deleteMessage(failed);
  }
  return answer(question);
}

window.addEventListener("pagehide", () => {
  for (const { message } of running.values()) save(message);
});
