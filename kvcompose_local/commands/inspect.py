"""``kvcompose-local inspect``: what a model's cache takes at each budget, from the GGUF header alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from kvcompose_local.arena import BLOCK, DEFAULT_CTX, TokenShape, cells_for, default_cache_type, share_of_f16
from kvcompose_local.commands.opening import fetched
from kvcompose_local.commands.options import cache_type_option
from kvcompose_local.errors import InvalidInput, ModelError
from kvcompose_local.install.model_files import size_of
from kvcompose_local.terminal.figures import MIB
from kvcompose_local.terminal.status import Status

BUDGETS = (1.0, 0.5, 0.25, 0.1)
#: Why the cells of some kinds of cache cannot be composed.
_OBSTACLES = {
    "mla": "its latent attention (MLA) has no cells by head",
    "recurrent": "it is recurrent",
    "hybrid": "it is partly recurrent",
    "m-rope": "its positions have several dimensions (M-RoPE)",
    "rotation-free": "its keys carry no rotation (RoPE)",
}


@dataclass(frozen=True)
class Inspection:
    """Sizes in bytes; n_values: numbers that one token takes over all layers; cache_type: None where budgets choose it;
    head_sizes: numbers of a key and of a value of a head; n_window: tokens that a sliding-window layer holds.
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
    n_window: int
    composable: str
    file_bytes: int
    free_bytes: int

    def type_at(self, budget: float) -> str:
        """How cells are stored under a budget."""
        from kvcompose_local.llama_ffi.cells import library_is_patched
        from kvcompose_local.llama_ffi.library import layers_to_offload

        whole_blocks = all(size % BLOCK == 0 for size in self.head_sizes)
        on_gpu, patched = layers_to_offload(None) > 0, library_is_patched()
        return self.cache_type or default_cache_type(budget, whole_blocks=whole_blocks, on_gpu=on_gpu, patched=patched)

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
        return self.n_cells(budget) * self.row_bytes(budget)

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.name} ({self.architecture}): {self.n_layers} layers, {self.n_heads} query heads, "
            f"{self.n_kv_heads} KV heads, trained for {self.n_ctx_train} positions",
            f"weights {self.file_bytes / MIB:.0f} MiB; cache {self.row_bytes(1) / 1024:.1f} KiB a token; "
            f"free memory now {self.free_bytes / MIB:.0f} MiB",
            "",
            f"{'budget':>8}{'cache MiB':>12}{'with weights MiB':>18}{'cells':>10}{'type':>12}",
        ]
        for budget in BUDGETS:
            if not self.n_cells(budget):
                lines.append(f"{budget:>8g}   too few cells: raise --ctx")
                continue
            whole = self.kv_bytes(budget) + self.file_bytes
            fits = "" if whole < self.free_bytes else "   does not fit now"
            lines.append(
                f"{budget:>8g}{self.kv_bytes(budget) / MIB:>12.0f}{whole / MIB:>18.0f}"
                f"{self.n_cells(budget):>10}{self.type_at(budget):>12}{fits}"
            )
        lines += [
            "",
            f"for --ctx {self.n_ctx}. A chat of more tokens than cells compresses, and where cells are many the budget "
            "pays for what that takes beside them. Estimates: the compute buffer adds some tens of MiB.",
        ]
        if self.n_window:
            lines.append(
                f"Sliding-window layers hold at most {self.n_window} tokens and are left as they are: the cache is "
                "smaller than this, by the share of such layers."
            )
        if self.composable:
            lines.append(f"Only --budget 1: {self.composable}.")
        return "\n".join(lines)


def inspect(path: Path, *, n_ctx: int | None = None, cache_type: str | None = None) -> Inspection:
    """Read a GGUF header. Raises ModelError for what is no language model, InvalidInput for an impossible n_ctx."""
    import psutil

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
        causal = model.metadata(f"{arch}.attention.causal") != "false"
        if not causal or n_layers == 0 or n_ctx_train == 0 or not heads or not kv_heads:
            raise ModelError(f"{path.name} is not a language model with attention that can chat")
        positions = min(DEFAULT_CTX, n_ctx_train) if n_ctx is None else n_ctx
        if not 0 < positions <= n_ctx_train:
            raise InvalidInput(f"--ctx {positions} is not in 1 to {n_ctx_train}, the positions that the model knows")
        k_size, v_size = widths = tuple(model.head_sizes("key_length", "value_length"))
        if min(widths) < 0 or sum(widths) == 0:
            raise ModelError(f"{path.name} says that its heads have {k_size} and {v_size} numbers")
        obstacle = _OBSTACLES.get(model.cache_kind(), "")
        if not obstacle and not all(model.kv_heads):
            obstacle = "some of its layers have no attention"

        def shown(values: list[int]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"

        return Inspection(
            model.name,
            arch,
            n_layers,
            shown(heads),
            shown(kv_heads),
            n_ctx_train,
            positions,
            sum(kv_heads) * sum(widths),
            cache_type,
            (k_size, v_size),
            number("attention.sliding_window"),
            obstacle,
            size_of(path),
            int(psutil.virtual_memory().available),
        )
    finally:
        model.close()


@click.command("inspect", short_help="What a model's cache takes at each budget.")
@click.argument("model", required=False)
@click.option("--ctx", "n_ctx", type=int, help="Positions to reckon with.  [default: 8192, or what the model knows]")
@cache_type_option
def inspect_command(model: str | None, n_ctx: int | None, cache_type: str | None) -> None:
    """Layers, heads, bytes a token, and memory at each budget, from the header of MODEL alone."""
    path = fetched(model, Status(sys.stderr))
    click.echo(inspect(path, n_ctx=n_ctx, cache_type=cache_type).text())
