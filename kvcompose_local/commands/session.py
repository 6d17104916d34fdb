"""The session that ``kvcompose-local run`` goes on from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from kvcompose_local.chat_options import ChatOptions
from kvcompose_local.errors import NoHome, SessionError
from kvcompose_local.interrupts import Interrupts
from kvcompose_local.terminal.status import Status

if TYPE_CHECKING:
    from kvcompose_local.chat.sessions import Manifest


@dataclass(frozen=True)
class Session:
    """The session that ``--session`` names.

    version: of the file when it was looked at first; manifest: None where there is no such file yet.
    """

    name: str | None
    path: Path | None = None
    version: tuple[int, ...] = ()
    manifest: Manifest | None = None

    @classmethod
    def named(cls, name: str | None) -> Session:
        """Look at it. Raises SessionError for a file that is no session."""
        from kvcompose_local.chat import sessions

        if name is None:
            return cls(None)
        path = sessions.path_of(name)
        version = sessions.version_of(path)
        return cls(name, path, version, sessions.read_manifest(path) if path.exists() else None)

    def over(self, context: click.Context, model: str | None, options: ChatOptions) -> tuple[str | None, ChatOptions]:
        """The model and the options; where the user chose nothing, the session's own."""
        from kvcompose_local.chat import sessions

        saved = self.manifest
        if saved is None:
            return model, options
        chosen = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
        options = replace(
            options,
            budget=options.budget if "budget" in chosen else saved.budget,
            cache_type=options.cache_type if "cache_type" in chosen else saved.cache_type,
            n_ctx=options.n_ctx or saved.n_ctx,
        )
        return sessions.model_of(saved) if model is None else model, options

    def check_model(self, path: Path, options: ChatOptions, interrupts: Interrupts, status: Status) -> None:
        """Raises SessionError where the session belongs to another model."""
        from kvcompose_local.chat import sessions

        if self.manifest is not None:
            setup = sessions.Setup(path, options.cache_type or self.manifest.cache_type, options.budget)
            with interrupts.caught():
                sessions.check_model(self.manifest, setup, status.checking)


def found_session(name: str | None, status: Status, *, must_exist: bool) -> Session:
    """The session of that name, once what crashes left is in order.

    Raises SessionError for a file that is no session, and for none where one ``must_exist``.
    """
    from kvcompose_local.chat import drafts, sessions
    from kvcompose_local.terminal.autosave import told_names

    folders = [sessions.path_of(name).parent] if name is not None else []
    with contextlib.suppress(NoHome):
        folders.append(sessions.sessions_folder())
    with drafts.alone():
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            for told in drafts.recover(folder):
                status.line(told)
    session = Session.named(name)
    if name is not None and session.manifest is None and must_exist:
        raise SessionError(f"there is no saved chat {name}; {told_names()}")
    return session
