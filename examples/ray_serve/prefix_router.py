# SPDX-License-Identifier: Apache-2.0
"""The policy as a request router of Ray Serve."""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ray_serve.prefix_policy import PrefixPolicy


class PrefixRouter(RequestRouter):
    """Routes requests whose first argument has a `route`; the loads are those of this handle's requests."""

    def initialize_state(self, *, max_imbalance: int, max_requests: int) -> None:
        self._policy = PrefixPolicy(max_imbalance, max_requests)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # between rounds in which nobody takes it
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in self._policy.rank(pending_request.args[0].route, by_name)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request_id = pending_request.metadata.internal_request_id
        self._policy.begin(request_id, pending_request.args[0].route, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._policy.end(internal_request_id, replica_id.unique_id)
