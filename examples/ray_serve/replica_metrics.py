# SPDX-License-Identifier: Apache-2.0
"""The metrics of all replicas as one document for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Labelled(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        yield from families.values()


def with_replica_label(texts: Mapping[str, str]) -> bytes:
    """Join texts of /metrics, by replica, and give every sample the label `replica`."""
    registry = CollectorRegistry()
    registry.register(_Labelled(texts))
    return generate_latest(registry)
