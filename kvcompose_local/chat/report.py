"""The report of a compaction, in numbers and in a line."""

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
        """One line for people; it includes ``earlier`` compactions that nobody was told of."""
        low, high = min(self.composed), max(self.composed)
        cells = f"{low}" if low == high else f"{low}–{high}"
        seconds = sum(report.seconds for report in (*earlier, self))
        times = f", {len(earlier) + 1} times" if earlier else ""
        return (
            f"compacted: {self.tokens_seen} tokens seen, {cells} composed + {self.n_live} live cells a layer, "
            f"{self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB in {seconds:.1f} s{times}"
        )
