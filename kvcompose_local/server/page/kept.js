// Chats that the server keeps and this browser has no history of: other programs began them, or another browser.

import * as api from "./api.js";
import { askFor } from "./dialogs.js";
import { $, bytes, count, h, iconButton } from "./dom.js";
import { on, openChat, tell } from "./state.js";
import * as store from "./store.js";

const list = $("kept").querySelector("ul");

async function render() {
  if (!$("kept").open) return;
  let chats;
  try {
    const known = await store.keptIds();
    chats = (await api.keptChats()).filter((chat) => !known.has(chat.id));
  } catch (error) {
    list.replaceChildren(h("li", { class: "none" }, error.message));
    return;
  }
  list.replaceChildren(
    ...chats.map((chat) => {
      const title = chat.title || "Untitled";
      const about = `${count(chat.n_tokens)} tokens, ${chat.where}${chat.bytes ? `, ${bytes(chat.bytes)}` : ""}`;
      return h(
        "li",
        {},
        h(
          "button",
          { type: "button", class: "chat", title: `${title}\n${about}`, onclick: () => open(chat) },
          title,
          " ",
          h("small", {}, about),
        ),
        iconButton("delete", `Delete ${title}`, () => forget(chat)),
      );
    }),
  );
  if (!chats.length) list.append(h("li", { class: "none" }, "None that is not listed above."));
}

async function open(chat) {
  try {
    const [id] = await store.imported(await api.keptChat(chat.id));
    await openChat(id);
    tell("chats");
    $("input").focus();
  } catch (error) {
    list.replaceChildren(h("li", { class: "none", role: "alert" }, error.message));
  }
}

async function forget(chat) {
  const sure = await askFor({
    title: "Delete this chat?",
    text: `The server forgets “${chat.title}”: its text and what the model read.`,
    action: "Delete",
    isDangerous: true,
  });
  if (!sure) return;
  await api.forget(chat.id).catch(() => {}); // the list tells
  await render();
}

$("kept").addEventListener("toggle", render);
on("ended chats", render);
