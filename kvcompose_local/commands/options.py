"""What the options of several commands are made of."""

from __future__ import annotations

import math
import os
from typing import Any

import click

#: More threads than the machine has wait for each other at every layer: a question takes minutes instead of a second.
threads_option = click.option(
    "--threads", type=click.IntRange(1, os.cpu_count() or 1), help="CPU threads.  [default: fast cores]"
)


class Real(click.FloatRange):
    """A float inside its range; click's own lets NaN through, which no comparison keeps out."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        number = float(super().convert(value, parameter, context))
        if math.isnan(number):
            self.fail(f"{value} is not a number", parameter, context)
        return number
