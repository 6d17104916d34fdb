"""The commands of a chat in a terminal: each is a method here, and ``/help`` lists them in this order."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from kvcompose_local.chat import inputs
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interrupts import Interrupts
from kvcompose_local.terminal.answers import Answers, check_room
from kvcompose_local.terminal.figures import beside, left
from kvcompose_local.terminal.memory_chart import ASCII_MARKS, UNICODE_MARKS, can_show, draw

#: What begins and ends a message of several lines.
FENCE = '"""'
_USAGE_COLUMNS = 15  # of the names in ``/help``


@dataclass(frozen=True)
class ChatCommand:
    """usage: as ``/help`` shows it; run: gets what stands after the name, and returns whether the chat ends."""

    usage: str
    help: str
    run: Callable[[ChatCommands, str], bool | None]

    @property
    def takes_text(self) -> bool:
        """Whether something may stand after the name."""
        return " " in self.usage


#: By name, in the order of ``/help``.
COMMANDS: dict[str, ChatCommand] = {}
#: What people know from other programs.
_OTHER_NAMES = {"/exit": "/quit", "/bye": "/quit", "/?": "/help"}


def command(
    usage: str, help: str
) -> Callable[[Callable[[ChatCommands, str], bool | None]], Callable[[ChatCommands, str], bool | None]]:
    """Make a method a command."""

    def register(run: Callable[[ChatCommands, str], bool | None]) -> Callable[[ChatCommands, str], bool | None]:
        COMMANDS[usage.split()[0]] = ChatCommand(usage, help, run)
        return run

    return register


class ChatCommands:
    """The commands, and what they work on.

    describe: the text of /stats; save, load: take the name of a session and return what to say of it; edit: shows a
    text to be edited and returns it, None or an interrupt for no change; at_temperature: entered while an answer is
    drawn at another temperature.
    """

    def __init__(
        self,
        answers: Answers,
        interrupts: Interrupts,
        *,
        describe: Callable[[], str] = lambda: "",
        save: Callable[[str], str] = lambda name: "",
        load: Callable[[str], str] = lambda name: "",
        edit: Callable[[str], str | None] | None = None,
        at_temperature: Callable[[float], AbstractContextManager[object]] = lambda temperature: nullcontext(),
    ) -> None:
        self.answers = answers
        self.chat = answers.chat
        self.status = answers.status
        self.interrupts = interrupts
        self.describe = describe
        self.save = save
        self.load = load
        self.edit = edit
        self.at_temperature = at_temperature

    def run(self, line: str) -> bool:
        """Do what a line says; returns whether the chat ends. Raises what the command does."""
        name, _, argument = line.strip().partition(" ")
        known = name.lower()
        found, argument = COMMANDS.get(_OTHER_NAMES.get(known, known)), argument.strip()
        if found is None:
            self.status.line(
                f"there is no {name}: /help lists the commands, /quit leaves, and a space before it sends the line as "
                "a message"
            )
            return False
        if argument and not found.takes_text:
            raise InvalidInput(f"{name} takes nothing after it; a space before it sends the line as a message")
        return bool(found.run(self, argument))

    @command("/help", "this text")
    def _help(self, _: str) -> None:
        self.status.line(HELP, indent=_USAGE_COLUMNS + 1)

    @command("/undo", "take back your last message and its answer, or the document read last")
    def _undo(self, _: str) -> None:
        self.status.line(f"taken back: {self.chat.undo()}{self.answers.unread()}")

    @command("/regen [T]", "another answer to your last message, drawn at temperature T if given")
    def _regen(self, argument: str) -> None:
        try:
            temperature = float(argument) if argument else None
        except ValueError:
            temperature = -1.0
        if temperature is not None and not 0 <= temperature <= 10:
            raise InvalidInput(f"/regen takes a temperature from 0 to 10, not {argument!r}")
        before = self.chat.messages[-1:]
        with nullcontext() if temperature is None else self.at_temperature(temperature):
            stats = self.answers.stream(self.chat.ask_again(max_tokens=self.answers.max_tokens))
        self.answers.explain_end(stats)
        if self.chat.messages[-1:] == before and stats.stopped != "interrupt":
            self.status.line("(the same answer again: /regen 1 varies it more)")

    @command("/edit [TEXT]", "another text in place of your last message; without TEXT the old one is there to edit")
    def _edit(self, argument: str) -> None:
        before = self.chat.last_message
        text: str | None = argument
        if not argument:
            if self.edit is None:
                raise InvalidInput("/edit takes the new text")
            with contextlib.suppress(KeyboardInterrupt), self.interrupts.waiting():
                text = self.edit(before)
        if text and text.strip():
            answer = self.chat.ask(text, max_tokens=self.answers.max_tokens, instead=True)
            self.answers.explain_end(self.answers.stream(answer))
        else:
            self.status.line("nothing is changed")

    @command("/forget", "drop the thinking of the last answer")
    def _forget(self, _: str) -> None:
        self.status.line(f"forgotten: {self.chat.forget_thinking()} tokens of thinking{self.answers.unread()}")

    @command(
        "/pin",
        "keep every token of your last message, or of the document read last, when the cache is compressed",
    )
    def _pin(self, _: str) -> None:
        n_tokens = self.chat.pin()
        self.status.line(f"pinned: {n_tokens} tokens are kept whenever the cache is compressed{self.answers.unread()}")

    @command("/stats", "speeds, tokens and cache of this chat")
    def _stats(self, _: str) -> None:
        self.status.line(self.describe())

    @command("/memory", "what each layer of the cache holds, and what is left of each message and document")
    def _memory(self, _: str) -> None:
        memory = self.chat.memory
        fancy = can_show(UNICODE_MARKS, self.status.stream.encoding)
        chart = draw(
            memory.engine.layout(),
            memory.engine.shape,
            cap_bytes=memory.engine.cache_bytes,
            width=shutil.get_terminal_size().columns,
            marks=UNICODE_MARKS if fancy else ASCII_MARKS,
        )
        told = left(self.chat, shutil.get_terminal_size().columns)
        self.status.line("\n".join(filter(None, [chart, beside(memory), told])))

    @command("/compress [R]", "compress the cache now, keeping at most the share R of the bytes in use (default 0.5)")
    def _compress(self, argument: str) -> None:
        try:
            keep = float(argument) if argument else 0.5
        except ValueError as error:
            raise InvalidInput(f"/compress takes a share in (0, 1], not {argument!r}") from error
        memory = self.chat.memory
        report = memory.compact(keep)
        if report is None:
            self.status.line("there is nothing to compress yet")
        elif memory.n_pinned and report.bytes_after > 1.01 * keep * report.bytes_before:
            share = report.bytes_after / report.bytes_before
            self.status.line(
                f"{memory.n_pinned} pinned tokens take {share:.2f} of the bytes: of all that is not pinned, only the "
                "newest is left"
            )

    @command("/read FILE…", "read text files now, also *.txt; your next message asks about them")
    def _read(self, argument: str) -> None:
        if not argument:
            raise InvalidInput("/read takes a file name")
        with self.interrupts.waiting():  # a pipe may keep it
            documents, empty = inputs.read_all(inputs.paths_in(argument))
        for name in empty:
            self.status.line(f"{name} holds no text: it is left out")
        check_room(self.chat, documents)
        for i, (name, text) in enumerate(documents):
            stats = self.chat.read(text)
            if stats.stopped == "interrupt":
                are_more = i + 1 < len(documents)
                self.status.line(inputs.told_stopped(name, self.chat.unread_tokens, are_more=are_more))
                break
            self.status.line(f"read {stats.prompt_tokens} tokens of {name}: ask about it")
        self.answers.warn_of_the_end()

    @command(
        "/system [TEXT]",
        'show the system prompt, or set it and read the conversation again under it; "" for none',
    )
    def _system(self, argument: str) -> None:
        if argument == '""':
            self.chat.set_system("")
            self.status.line(f"there is no system prompt any more{self.answers.unread()}")
        elif argument:
            self.chat.set_system(argument)
            self.status.line(f"the system prompt is set{self.answers.unread()}")
        else:
            self.status.line(self.chat.system or "there is no system prompt; /system TEXT sets one")

    @command("/clear", "forget the conversation, keep the system prompt")
    def _clear(self, _: str) -> None:
        self.chat.clear()
        self.status.line("forgotten: the conversation is empty")

    @command("/save NAME", "save the chat and its cache under a name, or to a path; it is the chat's from then on")
    def _save(self, argument: str) -> None:
        self.status.line(self.save(argument))

    @command("/load NAME", "go on from a saved chat, in place of this one")
    def _load(self, argument: str) -> None:
        self.status.line(self.load(inputs.session_in(argument)))

    @command("/quit", "leave (Ctrl-D does too)")
    def _quit(self, _: str) -> bool:
        return True


HELP = "\n".join(
    [
        *(f"{found.usage:<{_USAGE_COLUMNS}} {found.help}" for found in COMMANDS.values()),
        f"A line that begins with {FENCE} starts a message of several lines, which ends with {FENCE}.",
        "Ctrl-C stops the answer, the reading or the compaction that runs; the chat goes on.",
    ]
)
