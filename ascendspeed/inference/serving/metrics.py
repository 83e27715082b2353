"""Prometheus metrics under vLLM's names, so that its dashboards work."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ascendspeed.inference.serving.paged_engine import PagedEngine

PREFIX = "vllm:"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class EngineCollector(Collector):
    """Reads the engine's state when metrics are asked for."""

    def __init__(self, engine: PagedEngine, model_name: str) -> None:
        self._engine, self._labels = engine, {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        """Yields gauges and counters of the engine."""
        engine, scheduler = self._engine, self._engine.scheduler
        gauges = {
            "num_requests_running": ("Running sequences", len(scheduler.running) + len(scheduler.prefilling)),
            "num_requests_waiting": ("Waiting sequences", len(scheduler.waiting)),
            "kv_cache_usage_perc": (
                "Used part of the KV cache, 0 to 1",
                1 - engine.pool.available / engine.pool.num_blocks,
            ),
        }
        counters = {
            "prefix_cache_queries": ("Tokens of admitted prompts", scheduler.prefix_queries),
            "prefix_cache_hits": ("Tokens that were in the prefix cache", scheduler.prefix_hits),
            "num_preemptions": ("Preempted sequences", scheduler.preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter


class ServiceMetrics:
    """Counters and latencies of the service."""

    def __init__(self, engine: PagedEngine, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine, model_name))
        label, values = ["model_name"], {"model_name": model_name}

        def counter(name: str, text: str) -> Counter:
            return Counter(PREFIX + name, text, label, registry=self._registry).labels(**values)

        def histogram(name: str, text: str) -> Histogram:
            full = Histogram(PREFIX + name, text, label, registry=self._registry, buckets=SECONDS)
            return full.labels(**values)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "Generated tokens")
        self._finished = Counter(
            f"{PREFIX}request_success",
            "Finished sequences",
            [*label, "finished_reason"],
            registry=self._registry,
        )
        self._model_name = model_name
        self.time_to_first_token = histogram("time_to_first_token_seconds", "Seconds to the first token")
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Seconds between two tokens")
        self.request_latency = histogram("e2e_request_latency_seconds", "Seconds of a request")

    def start_request(self, prompt_tokens: int) -> "RequestTimer":
        """Counts a request; returns its timer."""
        self.prompt_tokens.inc(prompt_tokens)
        return RequestTimer(self)

    def count_finished(self, reason: str) -> None:
        """Counts a sequence that has ended."""
        self._finished.labels(model_name=self._model_name, finished_reason=reason).inc()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestTimer:
    """Latencies of one request."""

    def __init__(self, metrics: ServiceMetrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._last: float | None = None

    def record_token(self) -> None:
        """Records a token that has arrived."""
        now, metrics = time.monotonic(), self._metrics
        metrics.generation_tokens.inc()
        if self._last is None:
            metrics.time_to_first_token.observe(now - self._start)
        else:
            metrics.inter_token_latency.observe(now - self._last)
        self._last = now

    def stop(self) -> None:
        """Records the end of the request."""
        self._metrics.request_latency.observe(time.monotonic() - self._start)
