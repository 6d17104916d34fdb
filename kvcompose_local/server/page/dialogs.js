// Dialogs: one question, the settings of a chat, the keys.

import { $, h } from "./dom.js";
import { changeSettings, setDefaults, state } from "./state.js";

function open(dialog, ...content) {
  const form = dialog.querySelector("form");
  form.replaceChildren(...content);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue);
    dialog.onclick = (event) => {
      if (event.target === dialog) dialog.close(""); // beside it
    };
    dialog.returnValue = "";
  });
}

const buttons = (action, isDangerous = false) =>
  h(
    "div",
    { class: "row end" },
    h(
      "button",
      {
        value: "",
        class: "quiet",
        formNoValidate: true,
        type: "button",
        onclick: (event) => event.target.closest("dialog").close(""),
      },
      "Cancel",
    ),
    h("button", { value: "yes", class: isDangerous ? "danger" : "primary" }, action),
  );

/** Ask for a line of text (``field``: {label, value, type}), or for a yes. Resolves to the text, true, or null. */
export async function askFor({ title, text = "", field = null, action, isDangerous = false }) {
  const input =
    field &&
    h("input", {
      type: field.type ?? "text",
      value: field.value ?? "",
      required: true,
      autocomplete: "off",
      "aria-label": field.label,
    });
  const told = await open(
    $("ask-dialog"),
    h("h2", { id: "ask-title" }, title),
    text && h("p", {}, text),
    input,
    buttons(action, isDangerous),
  );
  if (told !== "yes") return null;
  return input ? input.value.trim() || null : true;
}

export const askForKey = (wasWrong) =>
  askFor({
    title: "API key",
    text: wasWrong ? "The server does not take this key." : "This server wants the key that it was started with.",
    field: { label: "API key", type: "password" },
    action: "Use it",
  });

const NUMBERS = [
  // name, label, lowest, highest, step, what it does
  ["temperature", "Temperature", 0, 5, 0.05, "0 always takes the likeliest word"],
  ["max_tokens", "Most tokens of an answer", 1, 1e7, 1, "as many as there is room for"],
  ["top_p", "Top p", 0, 1, 0.01, ""],
  ["top_k", "Top k", 0, 1e6, 1, ""],
  ["min_p", "Min p", 0, 1, 0.01, ""],
  ["repeat_penalty", "Repeat penalty", 0.1, 5, 0.05, "1 is none"],
  ["seed", "Seed", 0, 2 ** 32 - 2, 1, "another one each time"],
];

export async function editSettings() {
  const { settings, props } = state;
  const models = h(
    "select",
    { id: "set-model" },
    (props?.models ?? []).map(({ id }) =>
      h("option", { value: id, selected: id === (settings.model ?? props.default_model) }, id),
    ),
  );
  const system = h("textarea", {
    id: "set-system",
    rows: 4,
    value: settings.system ?? "",
    placeholder: props?.system ?? "none",
  });
  const inputs = NUMBERS.map(([name, , min, max, step, hint]) =>
    h("input", {
      id: `set-${name}`,
      name,
      type: "number",
      min,
      max,
      step: step < 1 ? "any" : step,
      value: settings[name] ?? "",
      placeholder: props?.default_sampling?.[name] ?? "",
      "aria-describedby": hint ? `hint-${name}` : null,
    }),
  );
  const asDefault = h("input", { type: "checkbox", id: "set-default", checked: state.chat === null });
  const told = await open(
    $("settings-dialog"),
    h("h2", { id: "settings-title" }, "Settings of this chat"),
    h("label", { for: "set-model" }, "Model"),
    models,
    h("label", { for: "set-system" }, "System prompt"),
    system,
    h(
      "div",
      { class: "grid" },
      NUMBERS.map(([name, label, , , , hint], i) =>
        h(
          "div",
          {},
          h("label", { for: `set-${name}` }, label),
          inputs[i],
          hint && h("small", { id: `hint-${name}` }, hint),
        ),
      ),
    ),
    h("label", { class: "check" }, asDefault, "New chats begin with these"),
    buttons("Keep"),
  );
  if (told !== "yes") return;
  const changed = {};
  if (models.value) changed.model = models.value;
  if (system.value.trim()) changed.system = system.value.trim();
  for (const input of inputs) if (input.value !== "") changed[input.name] = Number(input.value);
  if (asDefault.checked) setDefaults(changed);
  await changeSettings(changed);
}

export const KEYS = [
  ["Enter", "send"],
  ["Shift Enter", "a new line"],
  ["Escape", "stop the answer"],
  ["↑", "in an empty box: edit the last question"],
  ["Alt N", "new chat"],
  ["Alt B", "list of chats"],
  ["Alt M", "what the model remembers"],
  ["Alt S", "settings"],
  ["Alt E", "edit the last question"],
  ["Alt R", "answer again"],
  ["Alt ,", "earlier version"],
  ["Alt .", "later version"],
  ["Alt I", "message box"],
  ["Alt K", "this list"],
];

export function showKeys() {
  const rows = KEYS.map(([keys, does]) =>
    h(
      "tr",
      {},
      h(
        "td",
        {},
        keys.split(" ").map((key) => h("kbd", {}, key)),
      ),
      h("td", {}, does),
    ),
  );
  return open(
    $("keys-dialog"),
    h("h2", { id: "keys-title" }, "Keys"),
    h("table", {}, h("tbody", {}, rows)),
    h("div", { class: "row end" }, h("button", { class: "primary" }, "Close")),
  );
}
