"""Options of several commands, and how a command gets them as dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from kvcompose_local.arena import CACHE_TYPES
from kvcompose_local.chat_options import THINKING

Command = TypeVar("Command", bound=Callable[..., Any])


class Real(click.FloatRange):
    """A float inside its range; click's own lets NaN through, which no comparison keeps out."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        number = float(super().convert(value, parameter, context))
        if math.isnan(number):
            self.fail(f"{value} is not a number", parameter, context)
        return number


class Share(click.types.FloatParamType):
    """A number, or one in percent: ``25%`` is 0.25."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        percent: Any = str(value).strip().removesuffix("%")
        if percent != str(value).strip():
            return float(super().convert(percent, parameter, context)) / 100
        return float(super().convert(value, parameter, context))


class Positions(click.types.IntParamType):
    """A whole number, or one in units of 1024: ``8k`` is 8192."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        thousands: Any = str(value).strip().lower().removesuffix("k")
        if thousands != str(value).strip():
            return 1024 * int(super().convert(thousands, parameter, context))
        return int(super().convert(value, parameter, context))


def complete_model(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names of models, and files, for the shell."""
    from kvcompose_local.install import models

    known = [CompletionItem(name) for name in models.load_catalogue() if name.startswith(begun)]
    return [*known, CompletionItem(begun, type="file")]


thinking_option = click.option(
    "--thinking", type=click.Choice(THINKING), help="How much the model thinks, if its chat template has a switch."
)
model_argument = click.argument("model", required=False, shell_complete=complete_model)
#: More threads than the machine has wait for each other at every layer: a question takes minutes instead of a second.
threads_option = click.option(
    "--threads", "n_threads", type=click.IntRange(1, os.cpu_count() or 1), help="CPU threads.  [default: fast cores]"
)
gpu_layers_option = click.option(
    "--gpu-layers", type=click.IntRange(0), help="Layers on the GPU.  [default: as many as its free memory holds]"
)
cpu_first_option = click.option(
    "--gpu-layers", type=click.IntRange(0), default=0, show_default=True, help="Layers on the GPU."
)
cache_type_option = click.option("--cache-type", type=click.Choice(CACHE_TYPES), help="As in run.")


def gathered(**kinds: type) -> Callable[[Command], Command]:
    """Give a command dataclasses in place of options.

    With ``gathered(chat=ChatOptions)`` the command gets one argument, ``chat``, instead of the options that are named
    like fields of :class:`ChatOptions`. A dataclass may be a field of a later one.
    """

    def wrap(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            for name, kind in kinds.items():
                fields = {field.name for field in dataclasses.fields(kind)} & options.keys()
                options[name] = kind(**{field: options.pop(field) for field in sorted(fields)})
            return command(*arguments, **options)

        return wrapped  # type: ignore[return-value]

    return wrap


def names(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """Split at commas: a callback of options."""
    return tuple(part for part in value.split(",") if part)
