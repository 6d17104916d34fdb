// The message box: text, files, send and stop.

import { textOf } from "./api.js";
import { $, announce, bytes, count, h, icon, iconButton } from "./dom.js";
import { ask, runOf, stop } from "./runs.js";
import { model, on, shownPath, state } from "./state.js";
import { editLast } from "./transcript.js";

const input = $("input");
const isTouch = matchMedia("(pointer: coarse)");
let files = []; // {name, size, text?, error?}
let problem = "";
let sendsWhenRead = false; // sent while a file was still being read

function fit() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
}

async function attach(list) {
  const added = [...list].map((file) => ({ name: file.name, size: file.size, file }));
  problem = "";
  files.push(...added);
  render();
  await Promise.all(
    added.map(async (entry) => {
      try {
        entry.text = await textOf(entry.file);
        if (!entry.text.trim()) throw new Error(`there is no text in ${entry.name}`);
        announce(`${entry.name} is attached`);
      } catch (error) {
        files = files.filter((other) => other !== entry);
        problem = error.message;
        sendsWhenRead = false;
      }
      render();
    }),
  );
  if (sendsWhenRead) send();
}

function send() {
  const text = input.value.trim();
  sendsWhenRead = files.some((file) => file.text === undefined);
  if (runOf(state.chat?.id) || sendsWhenRead || !(text || files.length)) return;
  const attached = files.map(({ name, text }) => ({ name, text }));
  files = [];
  problem = "";
  input.value = "";
  sessionStorage.removeItem("draft");
  fit();
  ask(state.leaf, text, attached);
  render();
}

function render() {
  const runs = Boolean(runOf(state.chat?.id));
  if (runs && document.activeElement === $("send")) input.focus();
  $("send").hidden = runs;
  $("stop").hidden = !runs;
  $("files").replaceChildren(
    ...files.map((file) =>
      h(
        "li",
        {},
        icon("file"),
        h("span", {}, file.name),
        h("small", {}, file.text === undefined ? "reading…" : bytes(file.size)),
        iconButton("close", `Leave out ${file.name}`, () => {
          files = files.filter((other) => other !== file);
          render();
          input.focus();
        }),
      ),
    ),
  );
  renderStatus();
}

function renderStatus() {
  const shown = problem ? h("span", { class: "error", role: "alert" }, problem) : told();
  if (shown.textContent !== $("status").textContent) $("status").replaceChildren(shown); // or it is heard again
}

/** Which model, and how much of its context the chat takes. */
function told() {
  const found = model();
  const total = shownPath().findLast((message) => message.figures?.total)?.figures.total;
  return h(
    "span",
    {},
    [found?.id, found && total && `${count(Math.min(total, found.n_ctx))} of ${count(found.n_ctx)} tokens`]
      .filter(Boolean)
      .join(" · "),
  );
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => {
  stop();
  input.focus();
});
$("attach").addEventListener("click", () => $("file-input").click());
$("file-input").addEventListener("change", (event) => {
  attach(event.target.files);
  event.target.value = "";
  input.focus();
});
input.addEventListener("input", () => {
  sessionStorage.setItem("draft", input.value);
  fit();
});
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouch.matches) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !input.value) {
    event.preventDefault();
    editLast();
  }
});
input.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    attach(event.clipboardData.files);
  }
});

// Files may be dropped anywhere on the page; without this the browser would open them in its place.
let depth = 0;
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => {
  if (hasFiles(event)) document.body.classList.toggle("drops", (depth += 1) > 0);
});
addEventListener("dragleave", (event) => {
  if (hasFiles(event)) document.body.classList.toggle("drops", (depth -= 1) > 0);
});
addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("drops");
  attach(event.dataTransfer.files);
  input.focus();
});

on("shown ended", render);
on("props", renderStatus);
on("problem", (text) => {
  problem = text;
  renderStatus();
});
input.value = sessionStorage.getItem("draft") ?? "";
fit();
