// Markdown to elements: marked parses, highlight.js colours code, DOMPurify lets through what is listed here and no more.

import hljs from "./vendor/highlight.js";
import { Marked } from "./vendor/marked.js";
import { copyButton, h } from "./dom.js";

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  renderer: {
    // HTML of a model is text about HTML: it is shown, never obeyed.
    html: ({ text }) => escape(text),
    // No picture is fetched: an address may carry what the chat said to whoever owns it.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    code: ({ text, lang }) =>
      `<pre><code class="language-${escape((lang ?? "").split(/\s/)[0])}">${escape(text)}\n</code></pre>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS:
    "a p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li table thead tbody tr th td span".split(" "),
  ALLOWED_ATTR: ["href", "class", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const sanitized = (html) => window.DOMPurify.sanitize(html, ALLOWED);

/** So much code is coloured; more would hold up the page. */
const MOST_COLOURED = 50_000;

function finish(fragment) {
  for (const link of fragment.querySelectorAll("a")) {
    link.removeAttribute("class");
    if (link.hasAttribute("href")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
  }
  for (const code of fragment.querySelectorAll("pre > code")) {
    const language = code.className.replace(/^language-/, "");
    const text = code.textContent;
    if (hljs.getLanguage(language) && text.length < MOST_COLOURED)
      code.replaceChildren(sanitized(hljs.highlight(text, { language }).value));
    code.removeAttribute("class");
    const pre = code.parentElement;
    const box = h("div", { class: "code" });
    pre.replaceWith(box);
    pre.tabIndex = 0; // what scrolls sideways must be reached by keys
    box.append(
      h(
        "div",
        { class: "code-head" },
        h("span", {}, language),
        copyButton("Copy the code", () => text.replace(/\n$/, "")),
      ),
      pre,
    );
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(box);
    box.append(table);
  }
  return fragment;
}

/**
 * Shows a growing Markdown text in ``container``: blocks that did not change keep their elements, so that a selection
 * survives and a long answer costs no more than its last block.
 */
export class MarkdownView {
  #blocks = [];

  constructor(container) {
    this.container = container;
  }

  /** Returns the texts of blocks that are new and complete, for those who hear the answer. */
  update(text, isOver = true) {
    const tokens = marked.lexer(text);
    let same = 0;
    while (same < tokens.length && same < this.#blocks.length && this.#blocks[same].raw === tokens[same].raw) same += 1;
    for (const { nodes } of this.#blocks.splice(same)) nodes.forEach((node) => node.remove());
    for (const token of tokens.slice(same)) {
      const fragment = finish(sanitized(marked.parser(Object.assign([token], { links: tokens.links }))));
      const nodes = [...fragment.childNodes];
      this.container.append(fragment);
      this.#blocks.push({ raw: token.raw, nodes, isHeard: false });
    }
    const complete = this.#blocks.slice(0, isOver ? undefined : -1).filter((block) => !block.isHeard);
    for (const block of complete) block.isHeard = true;
    return complete
      .map((block) =>
        block.nodes
          .map((node) => node.textContent)
          .join(" ")
          .trim(),
      )
      .filter(Boolean);
  }
}
