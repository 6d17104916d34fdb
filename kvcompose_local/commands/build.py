"""``kvcompose-local build``."""

from __future__ import annotations

import sys

import click

from kvcompose_local.terminal.status import Status


@click.command("build", short_help="Build the patched llama.cpp; nothing to do when it is there.")
@click.option("--jobs", type=click.IntRange(1), help="Parallel compiler runs.  [default: all cores]")
@click.option("--stock", is_flag=True, help="Build llama.cpp without the patches.")
@click.option("--cuda", "device", flag_value="cuda", help="For NVIDIA GPUs, too: needs nvcc of CUDA's toolkit.")
@click.option("--vulkan", "device", flag_value="vulkan", help="For other GPUs, too: needs glslc and Vulkan's headers.")
def build_command(jobs: int | None, stock: bool, device: str | None) -> None:
    """Build the patched llama.cpp into the cache folder; does nothing when it is there.

    From then on the program takes a build for a GPU before one without; on a Mac every build has Metal.
    """
    from kvcompose_local.install import build as builder

    status = Status(sys.stderr)

    def progress(what: str, done: int, total: int) -> None:
        if total:
            status.progress(f"{what}:", done, total, "steps")
        else:
            status.line(what)

    click.echo(str(builder.build(patched=not stock, jobs=jobs, device=device, progress=progress)))
