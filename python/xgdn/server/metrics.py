# SPDX-License-Identifier: Apache-2.0
"""Counters, gauges and histograms of /metrics, in a registry of their own, and the history that the page draws."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from xgdn.server.history import History, LogHistogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class _Durations:
    """Durations for Prometheus, in its few buckets, and for the history, in fine ones."""

    def __init__(self, histogram: Histogram, recent: LogHistogram) -> None:
        self._histogram = histogram
        self._recent = recent

    def observe(self, seconds: float) -> None:
        self._histogram.observe(seconds)
        self._recent.observe(seconds)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.history = History(time.perf_counter())
        self.healthy = self._gauge("healthy", "0 once the engine has stopped, as /health tells, else 1.")
        self.requests_waiting = self._gauge("requests_waiting", "Sequences that have not begun.")
        self.requests_running = self._gauge("requests_running", "Sequences that have begun.")
        self.slots_used = self._gauge("slots_used", "State slots held.")
        self.slots_total = self._gauge("slots_total", "State slots.")
        self.kv_blocks_used = self._gauge("kv_blocks_used", "KV blocks held.")
        self.kv_blocks_total = self._gauge("kv_blocks_total", "KV blocks.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of accepted prompts, once whatever n.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated for clients.")
        self.steps = self._counter("steps", "Steps of the engine.")
        self.step_seconds = self._counter("step_seconds", "Time in steps of the engine.")
        self.forward_seconds = self._counter("forward_seconds", "Time in the model's forward, within the steps.")
        self.preemptions = self._counter("preemptions", "How often a sequence gave its KV blocks to an older one.")
        self.prefixes = self._gauge("prefix_cache_prefixes", "Cached prefixes, each in a state slot of its own.")
        self.prefix_bytes = self._gauge("prefix_cache_bytes", "States of cached prefixes, and KV that they alone hold.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up in the cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens whose state was in the cache.")
        self.prefix_evictions = self._counter("prefix_cache_evictions", "Prefixes given up for room.")
        self.sessions = self._gauge("sessions", "Open sessions.")
        self.session_tokens = self._gauge("session_tokens", "Tokens of the open sessions.")
        self.sessions_expired = self._counter("sessions_expired", "Sessions closed because they were idle.")
        self.drafted = self._counter("draft_tokens", "Tokens that were drafted and verified, by source.", "source")
        self.accepted = self._counter("accepted_draft_tokens", "Drafted tokens that were right.", "source")
        self.errors = self._counter("errors", "Errors that clients were told, by code.", "type")
        self.finished = self._counter("finished", "Sequences that ended, by reason.", "reason")
        self.time_to_first_token = _Durations(
            self._histogram("time_to_first_token_seconds", "From acceptance to the first token."),
            self.history.time_to_first_token,
        )
        self.inter_token_time = _Durations(
            self._histogram("inter_token_seconds", "Between two tokens of a sequence."), self.history.inter_token
        )

    def render(self) -> bytes:
        """Return all of them in the text format of Prometheus."""
        return generate_latest(self.registry)

    def value(self, name: str) -> float:
        """Return the value of a sample without labels."""
        return self.registry.get_sample_value(f"xgdn_{name}") or 0.0

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"xgdn_{name}", about, registry=self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"xgdn_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"xgdn_{name}", about, buckets=_SECONDS, registry=self.registry)
