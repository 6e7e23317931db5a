"""Figures for Prometheus. They count and time; nothing that users wrote is in them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "deepseek_vl2_requests", "Requests by path and status", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "deepseek_vl2_request_seconds",
            "Seconds from request to the end of the response",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.seconds_to_first_token = Histogram(
            "deepseek_vl2_first_token_seconds",
            "Seconds from request to the first text",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, those of pictures included")
        self.image_tokens = self._counter("image_tokens", "Tokens of pictures")
        self.new_tokens = self._counter("completion_tokens", "Tokens of answers")
        self.pictures = self._counter("pictures", "Pictures of questions")
        self.cancelled = self._counter("cancelled_requests", "Requests whose client went away")
        self._rows = Histogram(
            "deepseek_vl2_batch_rows", "Answers in a decoding step", buckets=_ROWS, registry=self._registry
        )

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"deepseek_vl2_{name}", description, registry=self._registry)

    def note_step(self, num_rows: int) -> None:
        """Counts a step of the model."""
        self._rows.observe(num_rows)

    def add_gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Adds a figure that is asked for when it is read."""
        Gauge(f"deepseek_vl2_{name}", description, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All figures in Prometheus's format."""
        return generate_latest(self._registry)
