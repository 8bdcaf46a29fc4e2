# SPDX-License-Identifier: Apache-2.0
"""Replicas of `xgdn serve` behind Ray Serve:

cd examples && serve run ray_serve.app:build model=MODEL_DIR threads=8 min_replicas=2 max_replicas=4
"""

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from ray_serve.arguments import Arguments
from ray_serve.gateway import Gateway
from ray_serve.prefix_router import PrefixRouter
from ray_serve.replica import Replica
from ray_serve.versions import check_ray, xgdn_version

_SPARE_REQUESTS = 4  # beyond those that the router lets a replica have, so that a full one still tells its metrics
_GATEWAY_REQUESTS = 10_000  # at once; each waits, or passes an answer on


def build(arguments: Arguments) -> serve.Application:
    """Return the application: a gateway, and replicas that it sends requests to.

    Raises:
        RuntimeError: Ray is of a version that was not tested.
        ValueError: a file of the model or of the API keys is wrong.
        OSError: it cannot be read.
    """
    check_ray(ray.__version__)
    arguments.settings()  # so that a wrong file is told here
    router = RequestRouterConfig()
    if arguments.routing == "prefix":
        kwargs = {"max_imbalance": arguments.max_imbalance, "max_requests": arguments.max_batch_size}
        router = RequestRouterConfig(request_router_class=PrefixRouter, request_router_kwargs=kwargs)
    replicas = serve.deployment(
        ray_actor_options={"num_cpus": arguments.threads},
        max_ongoing_requests=arguments.max_batch_size + _SPARE_REQUESTS,
        max_queued_requests=arguments.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.target_requests,
            upscale_delay_s=arguments.upscale_seconds,
            downscale_delay_s=arguments.downscale_seconds,
        ),
        graceful_shutdown_timeout_s=arguments.shutdown_seconds,
        max_constructor_retry_count=1,  # what was wrong will be wrong again
        request_router_config=router,
    )(Replica)
    gateway = serve.deployment(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=arguments.shutdown_seconds,
        max_constructor_retry_count=1,
    )(Gateway)
    version = xgdn_version()
    return gateway.bind(replicas.bind(arguments, version), arguments, version)
