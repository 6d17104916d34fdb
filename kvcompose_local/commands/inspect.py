"""``kvcompose-local inspect``: what a model's cache takes at each budget, from the GGUF header alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvcompose_local import profiles
from kvcompose_local.arena import (
    CELL_PADDING,
    DEFAULT_CTX,
    TokenShape,
    cells_for,
    default_cache_type,
    padded,
    share_of_f16,
)
from kvcompose_local.commands.opening import fetched
from kvcompose_local.commands.options import Positions, cache_type_option, model_argument
from kvcompose_local.errors import InvalidInput, ModelError
from kvcompose_local.install.model_files import size_of
from kvcompose_local.terminal.figures import MIB
from kvcompose_local.terminal.status import Status

if TYPE_CHECKING:
    from kvcompose_local.llama_ffi.memory import Memory

BUDGETS = (1.0, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Inspection:
    """Sizes in bytes; n_values: numbers that one token takes over all layers; cache_type: None where budgets choose it;
    head_sizes: numbers of a key and of a value of a head; whole_blocks, one_type: see
    :func:`kvcompose_local.arena.default_cache_type`; n_window: tokens that a sliding-window layer holds; memories: at
    each budget that buys enough cells, as llama.cpp would allocate it, empty where it does not tell.
    """

    name: str
    architecture: str
    n_layers: int
    n_heads: str
    n_kv_heads: str
    n_ctx_train: int
    n_ctx: int
    n_values: int
    cache_type: str | None
    head_sizes: tuple[int, int]
    whole_blocks: bool
    one_type: bool
    n_window: int
    composable: str
    file_bytes: int
    free_bytes: int
    kl: Mapping[str, float]
    memories: Mapping[float, Memory]

    def type_at(self, budget: float) -> str:
        """How cells are stored under a budget."""
        from kvcompose_local.llama_ffi.cells import library_is_patched
        from kvcompose_local.llama_ffi.devices import gpus

        one_type, patched = self.one_type or bool(gpus()), library_is_patched()
        return self.cache_type or default_cache_type(
            budget, whole_blocks=self.whole_blocks, one_type=one_type, patched=patched, kl=self.kl
        )

    def row_bytes(self, budget: float) -> int:
        """Bytes of one token over all layers, uncompressed."""
        return int(2 * self.n_values * share_of_f16(self.type_at(budget), *self.head_sizes))

    def n_cells(self, budget: float) -> int:
        """Cells of each layer, on average, that a budget buys: as many of ``n_ctx`` tokens are kept.

        0 where that is less than there can be.
        """
        token = TokenShape(*self.head_sizes, self.n_values // sum(self.head_sizes))
        try:
            return min(cells_for(self.n_ctx, budget, self.type_at(budget), token), self.n_ctx)
        except InvalidInput:
            return 0

    def kv_bytes(self, budget: float) -> int:
        """Bytes of the cells of ``n_ctx`` positions under a budget."""
        memory = self.memories.get(budget)
        return memory.attention_bytes if memory else self.n_cells(budget) * self.row_bytes(budget)

    def beside_bytes(self, budget: float) -> int:
        """Bytes of sliding windows and recurrent states, which no budget is about."""
        memory = self.memories.get(budget)
        return memory.window_bytes + memory.recurrent_bytes if memory else 0

    def text(self) -> str:
        """For people."""
        beside = any(self.beside_bytes(budget) for budget in self.memories)
        memory = self.memories.get(1.0)
        token_bytes = memory.attention_bytes / padded(self.n_ctx) if memory else self.row_bytes(1)
        lines = [
            f"{self.name} ({self.architecture}): {self.n_layers} layers, {self.n_heads} query heads, "
            f"{self.n_kv_heads} KV heads, trained for {self.n_ctx_train} positions",
            f"weights {self.file_bytes / MIB:.0f} MiB; cache {token_bytes / 1024:.1f} KiB a token; "
            f"free memory now {self.free_bytes / MIB:.0f} MiB",
            "",
            f"{'budget':>8}{'cache MiB':>12}{'beside MiB' if beside else '':>{12 * beside}}{'with weights MiB':>18}"
            f"{'cells':>10}{'type':>12}",
        ]
        for budget in BUDGETS:
            if not self.n_cells(budget):
                lines.append(f"{budget:>8g}   too few cells: raise --ctx")
                continue
            whole = self.kv_bytes(budget) + self.beside_bytes(budget) + self.file_bytes
            fits = "" if whole < self.free_bytes else "   does not fit now"
            others = f"{self.beside_bytes(budget) / MIB:>12.1f}" if beside else ""
            lines.append(
                f"{budget:>8g}{self.kv_bytes(budget) / MIB:>12.0f}{others}{whole / MIB:>18.0f}"
                f"{self.n_cells(budget):>10}{self.type_at(budget):>12}{fits}"
            )
        lines += ["", *self._remarks()]
        return "\n".join(lines)

    def _remarks(self) -> list[str]:
        lines = [
            f"for --ctx {self.n_ctx}. A chat of more tokens than cells compresses, and where cells are many the budget "
            "pays for what that takes beside them. Estimates: the compute buffer adds some tens of MiB."
        ]
        memory = self.memories.get(1.0)
        if self.n_window and (memory is None or memory.n_window_layers):
            told = "what they take stands beside" if memory else "the cache is smaller by the share of such layers"
            window = f"Sliding-window layers hold at most {self.n_window} tokens and are left as they are: {told}."
            lines.append(window)
        if memory and memory.n_shared:
            lines.append(f"{memory.n_shared} layers read the cells of another and have none of their own.")
        if self.composable:
            lines.append(f"Only --budget 1: {self.composable}.")
        return lines


def inspect(path: Path, *, n_ctx: int | None = None, cache_type: str | None = None) -> Inspection:
    """Read a GGUF header. Raises ModelError for what is no language model, InvalidInput for an impossible n_ctx."""
    import psutil

    from kvcompose_local.engines import has_whole_blocks
    from kvcompose_local.engines.stock import why_not_stock
    from kvcompose_local.llama_ffi.cells import library_is_patched
    from kvcompose_local.llama_ffi.model import Model

    model = Model(path, header_only=True)
    try:
        arch = model.architecture

        def number(key: str, default: int = 0) -> int:
            value = model.metadata(f"{arch}.{key}")
            return int(value) if value and value.lstrip("-").isdigit() else default

        n_layers = number("block_count")
        heads, kv_heads = ([n for n in layers if n] for layers in (model.heads, model.kv_heads))
        n_ctx_train = number("context_length")
        if not model.can_generate or n_layers == 0 or n_ctx_train == 0:
            raise ModelError(f"{path.name} is not a language model that can chat")
        if not heads or not kv_heads:
            raise ModelError(f"{arch} runs with --budget 1 only: it has no attention, and takes the same for any text")
        positions = min(DEFAULT_CTX, n_ctx_train) if n_ctx is None else n_ctx
        if not 0 < positions <= n_ctx_train:
            raise InvalidInput(f"--ctx {positions} is not in 1 to {n_ctx_train}, the positions that the model knows")
        k_size, v_size = widths = tuple(model.head_sizes("key_length", "value_length"))
        if min(widths) < 0 or sum(widths) == 0:
            raise ModelError(f"{path.name} says that its heads have {k_size} and {v_size} numbers")
        if model.is_mla:  # the value is a part of the key
            v_size = 0

        profile = profiles.of_file(path)

        def shown(values: list[int]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"

        found = Inspection(
            model.name,
            arch,
            n_layers,
            shown(heads),
            shown(kv_heads),
            n_ctx_train,
            positions,
            sum(kv_heads) * (k_size + v_size),
            cache_type,
            (k_size, v_size),
            has_whole_blocks(model),
            model.one_type,
            number("attention.sliding_window"),
            "" if library_is_patched() else why_not_stock(model),
            size_of(path),
            int(psutil.virtual_memory().available),
            profile.kl if profile else {},
            {},
        )
    finally:
        model.close()
    return _with_memories(found, path) if library_is_patched() else found


def _with_memories(found: Inspection, path: Path) -> Inspection:
    """The same with what llama.cpp tells of contexts that take no memory. Raises ModelError where `run` would."""
    from kvcompose_local.engines.patched import PREFILL_MICRO_BATCH, SMALL_MICRO_BATCH
    from kvcompose_local.llama_ffi.memory import dry_memory
    from kvcompose_local.llama_ffi.model import Model

    model = Model(path, dry=True)
    try:
        memories = {
            budget: dry_memory(
                model,
                n_ctx=-(-found.n_cells(budget) // CELL_PADDING) * CELL_PADDING,
                n_positions=found.n_ctx,
                n_ubatch=PREFILL_MICRO_BATCH if budget == 1 else SMALL_MICRO_BATCH,
                cache_type=found.type_at(budget),
            )
            for budget in BUDGETS
            if found.n_cells(budget)
        }
    finally:
        model.close()
    return replace(found, memories=memories, composable=memories[1].obstacle)


@click.command("inspect", short_help="What a model's cache takes at each budget.")
@model_argument
@click.option(
    "--ctx", "n_ctx", type=Positions(), help="Positions to reckon with.  [default: 8192, or what the model knows]"
)
@cache_type_option
def inspect_command(model: str | None, n_ctx: int | None, cache_type: str | None) -> None:
    """Layers, heads, bytes a token, and memory at each budget, from the header of MODEL alone."""
    path = fetched(model, Status(sys.stderr))
    click.echo(inspect(path, n_ctx=n_ctx, cache_type=cache_type).text())
