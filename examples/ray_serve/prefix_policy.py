# SPDX-License-Identifier: Apache-2.0
"""Which replica takes a request."""

import hashlib
from collections import defaultdict
from collections.abc import Collection
from itertools import count

from ray_serve.recent import Recent
from ray_serve.route import Route


class PrefixPolicy:
    """Sends a request to the replica that has had the longest beginning of its prompt, unless that is far busier.

    A request whose beginning nobody has had goes to the least busy replica. Among equals a hash of the request and the
    replica decides, so that processes that know nothing of each other, and one that was restarted, mostly agree.

    Args:
        max_imbalance: a replica with this many more requests than the least busy one is passed over.
        max_requests: of a replica at once; the next ones wait until one of them ends.
        max_keys: beginnings that are remembered; the least recently used are forgotten.
    """

    def __init__(self, max_imbalance: int, max_requests: int, max_keys: int = 2**17) -> None:
        self._max_imbalance = max_imbalance
        self._max_requests = max_requests
        self._holders = Recent[int, frozenset[str]](max_keys)
        self._running: defaultdict[str, set[str]] = defaultdict(set)  # requests by replica
        self._others = count()  # requests without a key

    def rank(self, route: Route, replicas: Collection[str]) -> list[str]:
        """Return the replicas that may take a request now, the best first."""
        if route.replica is not None and route.replica in replicas:
            replicas = [route.replica]
        replicas = [name for name in replicas if self._load(name) < self._max_requests]
        key = route.keys[0] if route.keys else next(self._others)
        ranked = sorted(replicas, key=lambda name: (self._load(name), _hash(key, name)))
        holders = next(filter(None, (self._holding(key, replicas) for key in reversed(route.keys))), frozenset())
        home = next((name for name in ranked if name in holders), None)
        if home is not None and self._load(home) < self._load(ranked[0]) + self._max_imbalance:
            ranked.remove(home)
            ranked.insert(0, home)
        return ranked

    def begin(self, request_id: str, route: Route, replica: str) -> None:
        """Note that a replica has taken a request."""
        self._running[replica].add(request_id)
        for key in route.keys:
            self._holders.put(key, (self._holders.get(key) or frozenset()) | {replica})

    def end(self, request_id: str, replica: str) -> None:
        """Note that a replica has nothing to do with a request any more, if it ever had."""
        self._running[replica].discard(request_id)
        if not self._running[replica]:
            del self._running[replica]

    def _load(self, replica: str) -> int:
        return len(self._running.get(replica, ()))

    def _holding(self, key: int, replicas: Collection[str]) -> frozenset[str]:
        return (self._holders.get(key) or frozenset()).intersection(replicas)


def _hash(key: int, replica: str) -> bytes:
    return hashlib.blake2b(f"{key} {replica}".encode(), digest_size=8).digest()
