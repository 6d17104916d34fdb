"""The options of a chat, for ``run``, for :class:`kvcompose_local.LocalChat` and for servers."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field

from kvcompose_local.arena import CACHE_TYPES, cells_for
from kvcompose_local.errors import InvalidInput

#: What compression goes by: the content of the cells, or a replay of the text.
SCORINGS = ("cells", "replay")
#: How much a model thinks before it answers, as far as its chat template has a switch.
THINKING = ("off", "on", "low", "medium", "high")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy. Fields are llama.cpp's samplers, applied in this order.

    repeat_penalty, frequency_penalty, presence_penalty: of what was drawn since they were set, off at 1, 0 and 0.
    """

    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    temperature: float = 0.7
    seed: int | None = None
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def check(self) -> None:
        """Raises InvalidInput for what llama.cpp would take in silence, and mean something else by."""
        check_number("top_k", self.top_k, 0, whole=True)
        check_number("top_p", self.top_p, 0, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("temperature", self.temperature, 0)
        if self.seed is not None:
            check_number("seed", self.seed, 0, 2**32 - 1, whole=True)
        for name in ("repeat_penalty", "frequency_penalty", "presence_penalty"):
            check_number(name, getattr(self, name), -math.inf)


def check_number(name: str, value: object, least: float, most: float = math.inf, *, whole: bool = False) -> None:
    """Raises InvalidInput for what is no number in [least, most]; whole: or no int."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, kind) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and least <= number <= most:
            return
    told = (
        f"a {'whole ' * whole}number" + f" from {least:g}" * (least > -math.inf) + f" to {most:g}" * (most < math.inf)
    )
    raise InvalidInput(f"{name} is {told}, not {value!r}")


@dataclass(frozen=True)
class ChatOptions:
    """Everything that a chat is opened with, except the model.

    budget: share in (0, 1] of the bytes that an uncompressed F16 cache of ``n_ctx`` tokens takes; n_ctx: positions the
    chat may span (default 8192, or what the model was trained for); n_threads: default one a fast core; gpu_layers:
    default all where a GPU backend is built in; cache_type: ``f16``, ``q8_0``, …, default what the budget and the
    device suggest; scoring: ``cells``, by the model's profile or what a replay of the first text teaches, or
    ``replay``, as KVCompose was published; workers: ``HOST:PORT`` of ``rpc-server`` processes; system: default what
    ``models.txt`` says, or the template; template: a Jinja file, or a name: llama.cpp's, the GGUF's or ``plain``,
    default the GGUF's own; thinking: one of :data:`THINKING`, default what the template does unasked.
    """

    budget: float = 0.5
    n_ctx: int | None = None
    n_threads: int | None = None
    gpu_layers: int | None = None
    cache_type: str | None = None
    scoring: str = SCORINGS[0]
    workers: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    template: str | None = None
    thinking: str | None = None

    def check(self) -> None:
        """Raises InvalidInput for what no model can run with."""
        if not isinstance(self.budget, numbers.Real) or not 0 < self.budget <= 1:
            raise InvalidInput(f"--budget is a share in (0, 1], not {self.budget}")
        for name, least in (("n_ctx", -math.inf), ("n_threads", 1), ("gpu_layers", 0)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least, whole=True)
        if self.n_ctx is not None:
            cells_for(self.n_ctx, 1.0)
        if not isinstance(self.sampling, Sampling):
            raise InvalidInput(f"sampling is a Sampling, such as Sampling(temperature=0), not {self.sampling!r}")
        self.sampling.check()
        if self.cache_type is not None and self.cache_type not in CACHE_TYPES:
            raise InvalidInput(f"there is no cache type {self.cache_type}: {', '.join(CACHE_TYPES)}")
        if self.thinking not in (None, *THINKING):
            raise InvalidInput(f"there is no thinking {self.thinking}: {', '.join(THINKING)}")
        if self.scoring not in SCORINGS:
            raise InvalidInput(f"there is no scoring {self.scoring}: {', '.join(SCORINGS)}")
