"""What one turn and what one compaction did, in numbers and in a line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompactionReport:
    """What one compaction did. Bytes are of cells in use, seconds of wall time."""

    tokens_seen: int
    tokens_scored: int
    composed: tuple[int, ...]
    n_live: int
    bytes_before: int
    bytes_after: int
    score_seconds: float
    select_seconds: float
    rewrite_seconds: float

    @property
    def seconds(self) -> float:
        return self.score_seconds + self.select_seconds + self.rewrite_seconds

    def line(self, *earlier: CompactionReport) -> str:
        """One line for people, which counts in ``earlier`` ones that were not told."""
        low, high = min(self.composed), max(self.composed)
        cells = f"{low}" if low == high else f"{low}–{high}"
        seconds = sum(report.seconds for report in (*earlier, self))
        times = f", {len(earlier) + 1} times" if earlier else ""
        return (
            f"compacted: {self.tokens_seen} tokens seen, {cells} composed + {self.n_live} live cells a layer, "
            f"{self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB in {seconds:.1f} s{times}"
        )


@dataclass
class TurnStats:
    """Counts and wall seconds of one turn; compaction seconds are not part of the other two.

    reread_tokens: how many of the prompt's tokens were read before, since the template rewrites what was said.
    """

    prompt_tokens: int = 0
    reread_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compactions: int = 0
    compaction_seconds: float = 0.0
    stopped: str = ""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else 0.0
