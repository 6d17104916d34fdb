"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from kvcompose_local.server.requests import Begun, Done, Event, Failed

#: The service's own account of itself.
Props = Callable[[], Mapping[str, Any]]


class Metrics:
    """Counters of requests and tokens, and gauges of memory, in a registry of their own."""

    def __init__(self, props: Props) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvcompose_{name}", text, labels, registry=self.registry)

        self.answers = counter("answers", "Answers, by how they ended.", "finish")
        self.refused = counter("refused", "Requests refused since too many waited.")
        self.failed = counter("failed", "Requests that failed, by status.", "status")
        self.prompt = counter("prompt_tokens", "Tokens of prompts.")
        self.cached = counter("cached_tokens", "Tokens of prompts that were held.")
        self.reread = counter("reread_tokens", "Tokens of prompts that were read before and read again.")
        self.generated = counter("generated_tokens", "Tokens of answers.")
        self.read_seconds = Histogram(
            "kvcompose_read_seconds", "Seconds that prompts took to be read.", registry=self.registry
        )
        self.registry.register(_Gauges(props))

    def count(self, event: Event, begun: Begun | None = None) -> None:
        """Count what has happened."""
        if isinstance(event, Begun):
            self.prompt.inc(event.prompt_tokens)
            self.cached.inc(event.cached)
            self.reread.inc(event.reread)
        elif isinstance(event, Done):
            self.answers.labels(event.finish).inc()
            self.generated.inc(event.generated)
            self.read_seconds.observe(event.prefill_seconds)
        elif isinstance(event, Failed):
            self.failed.labels(str(event.error.status)).inc()

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self.registry)


class _Gauges:
    """The present values."""

    def __init__(self, props: Props) -> None:
        self._props = props

    def collect(self) -> Iterator[Metric]:
        props = self._props()
        ceiling, queue = props["ceiling"], props["queue"]
        for name, text, value in (
            ("cells_bytes", "Bytes allocated for cells.", ceiling["cells"]["bytes"]),
            ("cells_used_bytes", "Bytes of cells in use.", ceiling["cells"]["used"]),
            ("kept_bytes", "Bytes of kept chats in memory.", ceiling["kept"]["bytes"]),
            ("kept_bound_bytes", "Most bytes of kept chats in memory.", ceiling["kept"]["bound"]),
            ("kept_chats", "Chats that are kept, in memory or on disk.", ceiling["kept"]["chats"]),
            ("compute_bytes", "Bytes of work buffers.", ceiling["compute"]["bytes"]),
            ("disk_bytes", "Bytes of kept chats on disk.", ceiling["disk"]["bytes"]),
            ("rss_bytes", "Resident bytes of the process, the model's weights among them.", ceiling["rss"]),
            ("ceiling_bytes", "Most bytes of cells, kept chats and work buffers.", ceiling["total_bound"]),
            ("queue_waiting", "Requests that wait.", queue["waiting"]),
            ("queue_running", "Requests that are answered now.", queue["running"]),
        ):
            yield GaugeMetricFamily(f"kvcompose_{name}", text, value=value)
