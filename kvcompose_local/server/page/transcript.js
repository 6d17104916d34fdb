// The messages of the branch that is shown.

import { $, announce, copyButton, count, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { answer, ask, isInterrupted, isRunning, retry, runOf, speedOf } from "./runs.js";
import { model, on, shownPath, showSibling, state } from "./state.js";
import { children } from "./tree.js";

const root = $("transcript");
let views = new Map(); // message id → MessageView, those that are shown

class MessageView {
  #pending = false;
  #renderedAt = 0;
  #shown = {};

  constructor(message) {
    this.message = message;
    const isUser = message.role === "user";
    this.body = h("div", { class: isUser ? "text" : "markdown" });
    this.reasoning = h("div", { class: "markdown" });
    this.thinking = h("details", { class: "reasoning", hidden: true }, h("summary"), this.reasoning);
    this.files = h("ul", { class: "files" }, (message.files ?? []).map(attached));
    this.note = h("div", { class: "note" });
    this.foot = h("footer");
    this.element = h(
      "article",
      {
        class: `message ${message.role}`,
        tabIndex: -1,
        "aria-label": isUser ? "You" : "Answer",
        dataset: { id: message.id },
      },
      message.files?.length ? this.files : null,
      this.thinking,
      this.body,
      this.note,
      this.foot,
    );
    this.markdown = new MarkdownView(this.body);
    this.thoughts = new MarkdownView(this.reasoning);
    this.render();
  }

  /** Render soon: tokens come faster than anybody reads. */
  update(message) {
    this.message = message;
    if (this.#pending) return;
    this.#pending = true;
    setTimeout(
      () => {
        this.#pending = false;
        const follows = root.scrollHeight - root.scrollTop - root.clientHeight < 60;
        this.render();
        if (follows) toEnd();
      },
      Math.max(0, 60 - (performance.now() - this.#renderedAt)),
    );
  }

  render() {
    this.#renderedAt = performance.now();
    const { message } = this;
    const runs = isRunning(message);
    this.element.classList.toggle("running", runs);
    this.element.setAttribute("aria-busy", String(runs));
    if (message.role === "user") {
      if (!this.edits) this.body.textContent = message.content;
    } else {
      this.#renderAnswer(runs);
    }
    this.#renderNote(runs);
    this.#renderFoot(runs);
  }

  #renderAnswer(runs) {
    const { reasoning = "", content } = this.message;
    this.thinking.hidden = !reasoning;
    if (reasoning && this.#shown.reasoning !== reasoning) this.thoughts.update(reasoning, !runs || Boolean(content));
    const seconds = Math.round((this.message.thought ?? 0) / 1000);
    const told = runs && !content ? "Thinking…" : seconds ? `Thought for ${seconds} s` : "Thoughts";
    this.thinking.firstChild.textContent = told;
    const heard = this.markdown.update(content, !runs);
    if ((runs || this.#shown.runs) && heard.length) announce(heard.join("\n"));
    this.#shown = { reasoning, runs };
  }

  #renderNote(runs) {
    const { message } = this;
    const parts = [];
    if (runs) {
      const { progress, first } = runOf(message.chat);
      if (progress?.reading) {
        const [done, total] = progress.reading;
        parts.push(
          h("progress", { value: done, max: total, "aria-label": "Reading" }),
          `Reading ${count(done)} of ${count(total)} tokens`,
        );
      } else if (progress?.waiting) {
        parts.push(`Waiting: ${progress.waiting} before this one`);
      } else if (!first) {
        parts.push(h("span", { class: "dots", "aria-label": "Waiting for the first word" }, h("i"), h("i"), h("i")));
      }
    } else if (message.state === "failed") {
      parts.push(
        h("span", { class: "error", role: "alert" }, message.error),
        h("button", { type: "button", class: "quiet", onclick: () => retry(message) }, "Try again"),
      );
    } else if (message.state === "length") {
      parts.push("The answer ended at the limit of tokens.");
    } else if (message.state === "stopped") {
      parts.push("Stopped.");
    } else if (isInterrupted(message)) {
      parts.push("The page was closed before the answer ended.");
    }
    this.note.replaceChildren(...parts);
    this.note.hidden = parts.length === 0;
  }

  #renderFoot(runs) {
    const { message } = this;
    const all = children(state.messages, message.parent);
    const key = JSON.stringify([
      runs,
      all.length,
      all.findIndex((found) => found.id === message.id),
      message.figures,
      message.state,
    ]);
    if (runs) this.foot.replaceChildren(h("span", { class: "figures" }, live(runOf(message.chat))));
    if (key === this.footKey || runs) {
      this.footKey = runs ? null : key;
      return;
    }
    this.footKey = key; // buttons stay while nothing about them changes: one of them may have the focus
    this.foot.replaceChildren(
      ...branches(message, all),
      copyButton(message.role === "user" ? "Copy the question" : "Copy the answer", () => this.message.content),
      message.role === "user"
        ? iconButton("edit", "Edit the question", () => this.edit())
        : iconButton("again", "Answer again", () => answer(state.messages.get(message.parent))),
      h("span", { class: "figures" }, figures(message)),
    );
  }

  /** Another wording of a question: it becomes a branch. */
  edit() {
    this.edits = true;
    const { message } = this;
    const area = h("textarea", {
      value: message.content,
      "aria-label": "Question",
      rows: Math.min(12, 1 + message.content.split("\n").length),
    });
    const end = () => {
      this.edits = false;
      this.render();
      this.element.focus();
    };
    const form = h(
      "form",
      {
        class: "edit",
        onsubmit: (event) => {
          event.preventDefault();
          if (runOf(message.chat) || !(area.value.trim() || message.files?.length)) return;
          this.edits = false;
          ask(message.parent, area.value, message.files ?? []);
          $("input").focus();
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            end();
          } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            form.requestSubmit();
          }
        },
      },
      area,
      h(
        "div",
        { class: "row" },
        h("button", { class: "primary" }, "Ask"),
        h("button", { type: "button", class: "quiet", onclick: end }, "Leave it"),
      ),
    );
    this.body.replaceChildren(form);
    area.focus();
  }
}

function attached({ name, text }) {
  return h(
    "li",
    {},
    h("details", {}, h("summary", {}, icon("file"), h("span", {}, name)), h("pre", { tabIndex: 0 }, text)),
  );
}

function branches(message, all) {
  if (all.length < 2) return [];
  const at = all.findIndex((found) => found.id === message.id);
  const step = (by, name, label) => {
    const show = async () => {
      await showSibling(message, by);
      const shown = all[at + by] && views.get(all[at + by].id);
      shown?.element.querySelector(".branches button:not(:disabled)")?.focus();
    };
    return iconButton(name, label, show, { disabled: !all[at + by] });
  };
  const label = `Version ${at + 1} of ${all.length}`;
  const steps = [step(-1, "back", "Earlier version"), `${at + 1}/${all.length}`, step(1, "forth", "Later version")];
  return [h("span", { class: "branches", role: "group", "aria-label": label }, steps)];
}

const live = (run) => {
  const speed = speedOf(run);
  return speed ? `${speed.toFixed(1)} tokens/s` : "";
};

/** What an answer cost: speed, length, and what was not read twice. */
function figures({ figures, model: name }) {
  if (!figures) return "";
  const parts = [];
  if (figures.speed) parts.push(`${figures.speed.toFixed(1)} tokens/s`);
  if (figures.generated) parts.push(`${count(figures.generated)} tokens`);
  if (figures.cached) parts.push(`${count(figures.cached)} known, ${count(figures.read)} read`);
  else if (figures.read) parts.push(`${count(figures.read)} read`);
  if (figures.reread) parts.push(`${count(figures.reread)} of them again`);
  if (figures.compactions)
    parts.push(figures.compactions === 1 ? "compressed once" : `compressed ${figures.compactions} times`);
  if (name && name !== model()?.id) parts.push(name);
  return parts.join(" · ");
}

function toEnd() {
  root.scrollTop = root.scrollHeight;
}

function welcome() {
  const found = model();
  const lines = found
    ? [
        h(
          "p",
          {},
          h("strong", {}, found.id),
          ` remembers up to ${count(found.n_ctx)} tokens${found.budget < 1 ? ` in ${Math.round(100 * found.budget)}% of their memory` : ""}.`,
        ),
        h("p", {}, "Everything stays on this machine. Drop a file to talk about it."),
      ]
    : [h("p", {}, "Waiting for the server…")];
  return h("div", { class: "welcome" }, lines);
}

function render() {
  const shown = shownPath();
  const kept = new Map(shown.map((message) => [message.id, views.get(message.id) ?? new MessageView(message)]));
  const isSame = views.size > 0 && [...views.keys()].some((id) => kept.has(id));
  views = kept;
  for (const [id, view] of views) {
    view.message = state.messages.get(id);
    view.render();
  }
  const elements = shown.length ? [...views.values()].map((view) => view.element) : [welcome()];
  // Only what differs is touched, so that focus and selection stay.
  [...root.children].filter((child) => !elements.includes(child)).forEach((child) => child.remove());
  elements.forEach((element, i) => {
    if (root.children[i] !== element) root.insertBefore(element, root.children[i] ?? null);
  });
  if (!isSame || isRunning(shown.at(-1) ?? {})) toEnd();
}

/** Edit the last question that is shown. */
export function editLast() {
  const question = shownPath().findLast((message) => message.role === "user");
  if (question && !runOf(question.chat)) views.get(question.id)?.edit();
}

export function answerLast() {
  const question = shownPath().findLast((message) => message.role === "user");
  if (question) answer(question);
}

/** The branch before or after, of the last message that has one. */
export function stepBranch(by) {
  const message = shownPath().findLast((found) => children(state.messages, found.parent).length > 1);
  if (message) showSibling(message, by);
}

on("shown", render);
on("props", () => state.messages.size || render());
on("message", (message) => views.get(message.id)?.update(message));
