// The page: puts the parts together, and the keys.

import { onKeyWanted } from "./api.js";
import { askForKey, askFor, editSettings, showKeys } from "./dialogs.js";
import { $ } from "./dom.js";
import "./composer.js";
import "./kept.js";
import { toggleMemory } from "./memory.js";
import { runOf, stop } from "./runs.js";
import { refreshProps, toggleSidebar } from "./sidebar.js";
import { newChat, openChat, state, tell } from "./state.js";
import { answerLast, editLast, stepBranch } from "./transcript.js";

const THEMES = ["system", "light", "dark"];

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  nameTheme();
}

function nameTheme() {
  const theme = document.documentElement.dataset.theme ?? "as the system";
  $("theme").setAttribute("aria-label", `Colours: ${theme}`);
  $("theme").title = `Colours: ${theme}`;
}

const SHORTCUTS = {
  KeyN: () => $("new").click(),
  KeyB: () => toggleSidebar(),
  KeyM: toggleMemory,
  KeyS: editSettings,
  KeyE: editLast,
  KeyR: answerLast,
  KeyI: () => $("input").focus(),
  KeyK: showKeys,
  Comma: () => stepBranch(-1),
  Period: () => stepBranch(1),
};

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && runOf(state.chat?.id)) {
    event.preventDefault();
    stop();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey && SHORTCUTS[event.code]) {
    event.preventDefault();
    SHORTCUTS[event.code]();
  }
});

$("theme").addEventListener("click", nextTheme);
$("settings").addEventListener("click", editSettings);
$("help").addEventListener("click", showKeys);
$("memory-toggle").addEventListener("click", toggleMemory);
addEventListener(
  "hashchange",
  () => location.hash.slice(1) !== (state.chat?.id ?? "") && openChat(location.hash.slice(1)),
);
onKeyWanted(askForKey);
addEventListener("unhandledrejection", (event) => tell("problem", event.reason?.message ?? String(event.reason)));
nameTheme();

try {
  await (location.hash.length > 1 ? openChat(location.hash.slice(1)) : newChat());
} catch (error) {
  await askFor({
    title: "No history",
    text: `The browser does not store chats here (${error.message}).`,
    action: "Close",
  });
}
refreshProps(true);
if (!matchMedia("(pointer: coarse)").matches) $("input").focus();
