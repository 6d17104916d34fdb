"""A tab of the page, and what people do in it."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect


class Tab:
    """A tab of the page, by what people see of it."""

    def __init__(self, page: Page, address: str, at: str = "") -> None:
        self.page, self.address = page, address
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda line: line.type == "error" and self.faults.append(line.text))
        page.on("request", lambda asked: asked.url.startswith((address, "blob:")) or self.faults.append(asked.url))
        page.goto(at or address)
        expect(page.locator("#status")).to_contain_text("plain")  # the server's answer is there

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def questions(self) -> Locator:
        return self.page.get_by_role("article", name="You")

    @property
    def answers(self) -> Locator:
        return self.page.get_by_role("article", name="Answer")

    @property
    def box(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text: str) -> None:
        """Send, and wait for the end of the answer."""
        n = self.answers.count()
        self.send(text)
        self.awaits_answer(n + 1)

    def awaits_answer(self, n: int) -> None:
        expect(self.answers).to_have_count(n)
        expect(self.button("Send")).to_be_visible(timeout=60_000)

    def reload(self) -> None:
        """Load the page again, once what it has begun to write is written: transactions come one after another."""
        self.page.evaluate(
            """() => new Promise((settled, failed) => {
                const opening = indexedDB.open("kvcompose-local", 1);
                opening.onerror = failed;
                opening.onsuccess = () => {
                    const all = opening.result.transaction(["chats", "messages"], "readwrite");
                    all.objectStore("chats").count();
                    all.oncomplete = () => { opening.result.close(); settled(); };
                };
            })"""
        )
        self.page.reload()

    def takes_model(self, name: str) -> None:
        self.button("Settings of this chat").click()
        self.page.get_by_label("Model", exact=True).select_option(name)
        self.button("Keep").click()
        expect(self.page.locator("#status")).to_contain_text(name)

    def is_busy(self) -> bool:
        """Whether the server still generates, half a second from now."""
        self.page.wait_for_timeout(500)
        return bool(self.page.request.get(f"{self.address}/props").json()["queue"]["running"])

    def drop(self, *files: tuple[str, bytes]) -> None:
        """Drop files anywhere on the page, as a file manager does."""
        given = [{"name": name, "bytes": list(raw)} for name, raw in files]
        self.page.evaluate(
            """files => {
                const data = new DataTransfer();
                for (const { name, bytes } of files) data.items.add(new File([new Uint8Array(bytes)], name));
                const options = { dataTransfer: data, bubbles: true, cancelable: true };
                for (const kind of ["dragenter", "dragover", "drop"])
                    document.body.dispatchEvent(new DragEvent(kind, options));
            }""",
            given,
        )
