// The list of chats, export and import, and the meter of the ceiling.

import * as api from "./api.js";
import { askFor } from "./dialogs.js";
import { $, announce, bytes, count, h, iconButton } from "./dom.js";
import { runOf } from "./runs.js";
import { newChat, on, openChat, state, tell } from "./state.js";
import * as store from "./store.js";

const narrow = matchMedia("(max-width: 52rem)");
const CLOSED = "sidebar-closed";

export function toggleSidebar(opens = $("sidebar").hasAttribute("inert")) {
  document.body.classList.toggle("with-sidebar", opens);
  $("sidebar").inert = !opens;
  $("show-sidebar").setAttribute("aria-expanded", String(opens));
  if (!narrow.matches) localStorage.setItem(CLOSED, opens ? "" : "yes");
  if (narrow.matches && opens) $("hide-sidebar").focus();
}

function close() {
  toggleSidebar(false);
  $("show-sidebar").focus();
}

async function render() {
  const wanted = $("search").value.trim().toLowerCase();
  const chats = (await store.allChats()).filter((chat) => chat.title.toLowerCase().includes(wanted));
  const focused = document.activeElement?.closest?.("#chats li")?.dataset.id;
  $("chats").replaceChildren(
    ...chats.map((chat) => {
      const isShown = chat.id === state.chat?.id;
      const open = async () => {
        await openChat(chat.id);
        if (narrow.matches) toggleSidebar(false);
        $("input").focus();
      };
      return h(
        "li",
        { dataset: { id: chat.id }, class: isShown ? "shown" : null },
        h(
          "button",
          {
            type: "button",
            class: "chat",
            onclick: open,
            ondblclick: () => rename(chat),
            "aria-current": isShown ? "page" : null,
          },
          runOf(chat.id) ? h("span", { class: "dot", "aria-label": "answering" }) : null,
          chat.title,
        ),
        iconButton("edit", `Rename ${chat.title}`, () => rename(chat)),
        iconButton("delete", `Delete ${chat.title}`, () => remove(chat)),
      );
    }),
  );
  if (!chats.length)
    $("chats").append(h("li", { class: "none" }, wanted ? "No chat has this in its title." : "No chats yet."));
  if (focused)
    $("chats")
      .querySelector(`[data-id="${CSS.escape(focused)}"] .chat`)
      ?.focus();
  const title = chats.find((chat) => chat.id === state.chat?.id)?.title ?? state.chat?.title ?? "New chat";
  $("title").textContent = title;
  document.title = state.chat ? `${title} · kvcompose-local` : "kvcompose-local";
}

async function rename(chat) {
  const title = await askFor({ title: "Rename", field: { label: "Title", value: chat.title }, action: "Rename" });
  if (!title) return;
  const changed = await store.changeChat(chat.id, { title });
  if (changed && state.chat?.id === chat.id) state.chat.title = title;
  tell("chats");
}

async function remove(chat) {
  const sure = await askFor({ title: "Delete this chat?", text: chat.title, action: "Delete", isDangerous: true });
  if (!sure) return;
  runOf(chat.id)?.controller.abort();
  const kept = await store.deleteChat(chat.id);
  if (state.chat?.id === chat.id) newChat();
  tell("chats");
  $("new").focus();
  await Promise.allSettled(kept.map(api.forget)); // the server's text and cells of it
}

// -- export and import ----------------------------------------------------------------------------------------------

async function exportChats() {
  const blob = new Blob([JSON.stringify(await store.exported(), null, 1)], { type: "application/json" });
  const link = h("a", {
    href: URL.createObjectURL(blob),
    download: `chats-${new Date().toISOString().slice(0, 10)}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function importChats(file) {
  try {
    const ids = await store.imported(JSON.parse(await file.text()));
    announce(`${ids.length} chats are imported`);
    tell("chats");
    if (ids.length) await openChat(ids[0]);
  } catch (error) {
    const message = error instanceof SyntaxError ? "this file is no JSON" : error.message;
    await askFor({ title: "Nothing was imported", text: `${file.name}: ${message}.`, action: "Close" });
  }
}

// -- the meter --------------------------------------------------------------------------------------------------------

export async function refreshProps(mayAsk = false) {
  try {
    state.props = await api.props(mayAsk);
  } catch (error) {
    $("ceiling-text").textContent = error.message;
    return;
  }
  renderCeiling(state.props.ceiling);
  tell("props");
}

function renderCeiling({ cells, kept, compute, disk, rss, total_bound: bound }) {
  const parts = [
    ["cells", cells.bytes],
    ["kept", kept.bytes],
    ["compute", compute.bytes],
  ];
  const used = parts.reduce((sum, [, n]) => sum + n, 0);
  $("ceiling-text").textContent = `RAM ${bytes(used)} of ${bytes(bound)}`;
  $("ceiling-bar").replaceChildren(
    ...parts.map(([name, n]) => {
      const part = h("i", { class: name });
      part.style.width = `${Math.min(100, (100 * n) / bound)}%`;
      return part;
    }),
  );
  const row = (name, label, value) => [h("dt", { class: name }, label), h("dd", {}, value)];
  $("ceiling-parts").replaceChildren(
    ...row("cells", "Cells of the chat in use", `${bytes(cells.used)} of ${bytes(cells.bytes)}`),
    ...row("kept", `${count(kept.chats)} kept chats`, `${bytes(kept.bytes)} of ${bytes(kept.bound)}`),
    ...row("compute", "Work buffers", bytes(compute.bytes)),
    ...row("disk", "On disk", `${bytes(disk.bytes)} of ${bytes(disk.bound)}`),
    ...row("rss", "The whole program", bytes(rss)),
  );
}

$("new").addEventListener("click", () => {
  newChat();
  if (narrow.matches) toggleSidebar(false);
  $("input").focus();
});
$("show-sidebar").addEventListener("click", () => toggleSidebar());
$("hide-sidebar").addEventListener("click", close);
$("backdrop").addEventListener("click", close);
$("sidebar").addEventListener("keydown", (event) => event.key === "Escape" && narrow.matches && close());
$("search").addEventListener("input", render);
$("export").addEventListener("click", exportChats);
$("import").addEventListener("click", () => $("import-input").click());
$("import-input").addEventListener("change", (event) => {
  if (event.target.files[0]) importChats(event.target.files[0]);
  event.target.value = "";
});
narrow.addEventListener("change", () => toggleSidebar(!narrow.matches && !localStorage.getItem(CLOSED)));
on("shown chats", render);
on("ended", () => refreshProps());
setInterval(() => document.hidden || refreshProps(), 15_000);
toggleSidebar(!narrow.matches && !localStorage.getItem(CLOSED));
