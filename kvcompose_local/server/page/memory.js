// What the model still remembers: each token tinted by the share of layers and KV heads that hold its cell.

import * as api from "./api.js";
import { $, announce, bytes, count, h, percent } from "./dom.js";
import { runOf } from "./runs.js";
import { keptAnswer, on, state } from "./state.js";

const BUDGETS = [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1];
const LINES_OF_PART = 25;
const NAMES = { system: "System", user: "You", assistant: "Answer", tool: "Tool" };

let shown = null; // what the server told last of the chat as it is now
let preview = null; // what another budget would keep
let asking = null; // AbortController of the question on its way
let places = new Map(); // an element of tokens → its first token

/** Sentences and lines, as [start, stop) of tokens: what a click pins. */
export function passages(texts, start, stop) {
  const found = [];
  let from = start;
  let length = 0;
  for (let i = start; i < stop; i++) {
    length += texts[i].length;
    const next = texts[i + 1] ?? "";
    const isNumber = /\d$/.test(texts[i - 1] ?? ""); // of a list: its point ends no sentence
    const ends = texts[i].includes("\n") || (/[.!?。！？]["')\]]?$/.test(texts[i]) && /^\s/.test(next) && !isNumber);
    if (ends && length > 12 && i + 1 < stop && next.trim()) {
      found.push([from, i + 1]);
      from = i + 1;
      length = 0;
    }
  }
  if (from < stop) found.push([from, stop]);
  return found;
}

/** Neighbours of equal share as one run: [start, stop). A character that spans tokens stays in one piece. */
function runs(texts, shares, start, stop) {
  const found = [];
  for (let i = start; i < stop; i++) {
    const last = found.at(-1);
    if (last && (shares[i] === shares[last[0]] || texts[i - 1] === "")) last[1] = i + 1;
    else found.push([i, i + 1]);
  }
  return found;
}

function tinted(found, start, stop) {
  return runs(found.texts, found.shares, start, stop).map(([from, to]) => {
    const share = found.shares[from];
    const span = h("span", { class: share ? "t" : "t gone" }, found.texts.slice(from, to).join(""));
    span.style.setProperty("--tinted", `${(100 * share).toFixed(1)}%`);
    places.set(span, from);
    return span;
  });
}

/** What the template puts between messages. */
const markers = (spans) => (spans.length ? h("p", { class: "markers" }, spans) : null);

function block(found, span, from, isLast) {
  const { start, stop, role } = span;
  const part = found.shares.slice(start, stop);
  const mean = part.reduce((sum, share) => sum + share, 0) / Math.max(1, part.length);
  const pieces = passages(found.texts, start, stop).map(([first, end]) => {
    const isPinned = found.pins.some(([a, b]) => a <= first && end <= b);
    const pin = () => getSelection().isCollapsed && !isPinned && pinned(first, end);
    return h(
      "span",
      {
        class: isPinned ? "passage pinned" : "passage",
        role: "button",
        tabIndex: -1,
        "aria-pressed": String(isPinned),
        dataset: { start: first, stop: end },
        onclick: pin,
        onkeydown: (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), pin()),
      },
      tinted(found, first, end),
    );
  });
  const tail = isLast ? tinted(found, stop, found.texts.length) : [];
  return h(
    "article",
    { class: `remembered ${role}` },
    h("h2", {}, NAMES[role] ?? role, h("small", {}, `${count(part.length)} tokens, ${percent(mean)} held`)),
    markers(tinted(found, from, start)),
    parts(pieces).map((part) => h("p", {}, part)),
    markers(tail),
  );
}

/** Passages in parts of whole lines: a browser lays out those that are looked at, and a book has thousands of lines. */
function parts(pieces) {
  const found = [[]];
  for (const piece of pieces) {
    const last = found.at(-1);
    if (last.length >= LINES_OF_PART && last.at(-1).textContent.endsWith("\n")) found.push([piece]);
    else last.push(piece);
  }
  return found;
}

function render() {
  const found = preview ?? shown;
  places = new Map();
  if (!found) return;
  let from = 0;
  const top = $("memory-text").scrollTop;
  $("memory-text").replaceChildren(
    ...found.spans.map((span, i) => {
      const element = block(found, span, from, i === found.spans.length - 1);
      from = span.stop;
      return element;
    }),
  );
  $("memory-text").scrollTop = top;
  const first = $("memory-text").querySelector(".passage");
  if (first) first.tabIndex = 0;
  summarize(found);
  showBudget();
  $("unpin").hidden = shown.pins.length === 0;
}

function summarize(found) {
  const n = found.shares.length;
  const mean = found.shares.reduce((sum, share) => sum + share, 0) / Math.max(1, n);
  const gone = found.shares.filter((share) => share === 0).length;
  const held =
    mean === 1
      ? "every head holds all of them"
      : `a head holds ${percent(mean)} of them${gone ? `, ${count(gone)} are forgotten by all` : ""}`;
  const told = `${count(n)} tokens in ${bytes(found.bytes)} (uncompressed ${bytes(found.f16_bytes)}): ${held}.`;
  $("memory-summary").textContent = preview ? `With a budget of ${percent(BUDGETS[$("budget").value])}: ${told}` : told;
}

function say(text) {
  shown = preview = null;
  $("memory-text").replaceChildren(h("p", { class: "welcome" }, text));
  $("memory-summary").textContent = "";
  $("unpin").hidden = true;
}

/** Ask the server again, for now or for the budget of the slider. */
async function refresh({ budget = null } = {}) {
  if (!state.showsMemory) return;
  const answer = keptAnswer();
  asking?.abort();
  $("budget").disabled = !answer;
  if (!answer)
    return say(
      runOf(state.chat?.id)
        ? "The first answer is on its way."
        : "Here you see, after the first answer, what the model still holds of each word.",
    );
  asking = new AbortController();
  const { signal } = asking;
  $("memory").setAttribute("aria-busy", "true");
  try {
    const found = await api.memory(answer.kept, budget, signal);
    if (signal.aborted) return;
    if (budget === null) [shown, preview] = [found, null];
    else preview = found;
    shown ??= found;
    render();
  } catch (error) {
    if (error.name !== "AbortError")
      say(
        error.status === 404
          ? "The server keeps this chat no more: it reads it again with your next message."
          : error.message,
      );
  } finally {
    if (!signal.aborted) $("memory").removeAttribute("aria-busy");
  }
}

async function pinned(start, stop) {
  const answer = keptAnswer();
  $("memory-summary").textContent = "Pinning…";
  try {
    const { reread } = await api.pin(answer.kept, start, stop);
    announce(reread ? `Pinned; ${reread} tokens were read again` : "Pinned");
  } catch (error) {
    $("memory-summary").textContent = error.message;
    return;
  }
  await refresh(current());
  $("memory-text").querySelector(`[data-start="${start}"]`)?.focus();
}

const current = () => (preview ? { budget: BUDGETS[$("budget").value] } : {});

/** The slider stands where the chat is now until it is moved. */
function showBudget() {
  if (!preview && shown) {
    const now = shown.bytes / shown.f16_bytes;
    const far = (budget) => Math.abs(Math.log(budget / now));
    $("budget").value = BUDGETS.indexOf(BUDGETS.reduce((best, budget) => (far(budget) < far(best) ? budget : best)));
    $("budget-value").textContent = `now ${percent(now)}`;
  } else {
    $("budget-value").textContent = percent(BUDGETS[$("budget").value]);
  }
  $("budget").setAttribute("aria-valuetext", `${$("budget-value").textContent} of the uncompressed bytes`);
}

/** The tokens of the selection as [start, stop), or null. */
function selected() {
  const selection = getSelection();
  if (selection.isCollapsed || !$("memory-text").contains(selection.anchorNode)) return null;
  const range = selection.getRangeAt(0);
  const start = tokenAt(range.startContainer, range.startOffset);
  const last = tokenAt(range.endContainer, Math.max(0, range.endOffset - 1));
  return start === null || last === null || last < start ? null : [start, last + 1];
}

function tokenAt(node, offset) {
  const found = preview ?? shown;
  const span = (node.nodeType === Node.TEXT_NODE ? node.parentElement : (node.childNodes[offset] ?? node))?.closest?.(
    ".t",
  );
  if (!span || !found) return null;
  let token = places.get(span);
  for (
    let rest = node.nodeType === Node.TEXT_NODE ? offset : 0;
    rest >= found.texts[token]?.length && token + 1 < found.texts.length;
    token++
  )
    rest -= found.texts[token].length;
  return token;
}

export function toggleMemory() {
  state.showsMemory = !state.showsMemory;
  $("memory-toggle").setAttribute("aria-pressed", String(state.showsMemory));
  $("memory").hidden = !state.showsMemory;
  $("transcript").hidden = state.showsMemory;
  if (state.showsMemory) refresh();
}

let timer = null;
$("budget").addEventListener("input", () => {
  $("budget-value").textContent = percent(BUDGETS[$("budget").value]);
  $("legend").replaceChildren(
    ...[0, 0.25, 0.5, 0.75, 1].map((share) => {
      const swatch = h("i", { class: "t" });
      swatch.style.setProperty("--tinted", `${100 * share}%`);
      return swatch;
    }),
  );
  $("budget-now").hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => refresh({ budget: BUDGETS[$("budget").value] }), 200);
});
$("budget-now").addEventListener("click", () => {
  $("budget-now").hidden = true;
  $("budget").focus();
  refresh();
});
$("unpin").addEventListener("click", async () => {
  await api.unpin(keptAnswer().kept).catch((error) => announce(error.message));
  $("budget").focus();
  await refresh(current());
});
$("pin-selection").addEventListener("click", () => {
  const range = selected();
  getSelection().removeAllRanges();
  if (range) pinned(...range);
});
document.addEventListener("selectionchange", () => {
  if (state.showsMemory) $("pin-selection").hidden = selected() === null;
});
$("memory-text").addEventListener("pointerover", ({ target }) => {
  if (target.classList.contains("t")) {
    target.title = `held by ${percent((preview ?? shown).shares[places.get(target)])} of the heads`;
  }
});
$("memory-text").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  if (!step || !event.target.classList.contains("passage")) return;
  event.preventDefault();
  const all = [...$("memory-text").querySelectorAll(".passage")];
  const next = all[all.indexOf(event.target) + step];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

/** The answer on its way, which is held whole. */
function tail() {
  const run = state.showsMemory && runOf(state.chat?.id);
  $("memory-tail").hidden = !run;
  if (run) $("memory-tail").textContent = `${run.message.reasoning ?? ""}${run.message.content}`;
}

on("message", tail);
on("shown ended", () => {
  tail();
  $("budget-now").hidden = true;
  refresh();
});
showBudget();
$("legend").replaceChildren(
  ...[0, 0.25, 0.5, 0.75, 1].map((share) => {
    const swatch = h("i", { class: "t" });
    swatch.style.setProperty("--tinted", `${100 * share}%`);
    return swatch;
  }),
);
