# SPDX-License-Identifier: Apache-2.0
"""The processes that share a model: how they start, find each other and end.

Rank 0 is the process that makes an `Engine`. The others run `python -m xgdn.follower`, started by rank 0, or the same
program, started by torchrun. Rank 0 holds a pipe to each that it has started: whoever finds it closed ends.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from xgdn import _C
from xgdn._C import RankError, RequestError, RunnerOptions

__all__ = ["Invitation", "Ranks", "follow", "start_ranks", "torchrun_rank"]

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START_SECONDS = 180.0  # for interpreters and torch on a busy machine
_END_SECONDS = 10.0
_POLL_SECONDS = 0.02
_DEVICE_BACKENDS = {"cuda": "nccl", "npu": "hccl"}
_THREADS_BY_DEFAULT = torch.get_num_threads()


@dataclass(frozen=True)
class Invitation:
    """What a process needs to know to be one of the ranks."""

    rank: int
    world: int
    port: int  # of rank 0's store, at this machine
    threads: int
    model_dir: str
    options: dict[str, Any]  # of _C.EngineOptions, but for the group
    runner: dict[str, Any]  # of RunnerOptions


def torchrun_rank() -> int | None:
    """Return the rank that torchrun, or whoever sets its variables, has given this process; None without."""
    if not all(os.environ.get(name) for name in _TORCHRUN_VARIABLES):
        return None
    return int(os.environ["RANK"])


def engine_options(options: dict[str, Any], runner: RunnerOptions, group: str, local_rank: int) -> _C.EngineOptions:
    """Return the options of a rank: on its own device, in the group of that name."""
    device = torch.device(device_of(str(options["device"]), local_rank))
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)  # for what NCCL and the like do without a tensor
    given = {**options, "device": str(device)}
    return _C.EngineOptions(runner=runner, process_group=group, **given)


def _name_device(device: str) -> None:
    """Import the package that makes the device known, as rank 0's program has done."""
    if device.partition(":")[0] == "npu":
        import_module("torch_npu")


def device_of(device: str, local_rank: int) -> str:
    """Return the device of a rank, counted from that of the first."""
    kind, _, index = device.partition(":")
    return device if kind == "cpu" else f"{kind}:{int(index or 0) + local_rank}"


def start_ranks(
    model_dir: str, world: int, options: dict[str, Any], runner: RunnerOptions
) -> "tuple[Ranks, _C.EngineOptions]":
    """Make this process rank 0 of `world`: with torchrun's processes, or with some of its own. Return its options too.

    Under torchrun every process calls this; the others follow, and end when rank 0's engine does (SystemExit).

    Raises:
        xgdn.errors.RequestError: torchrun has started another number, or this process has another group.
        xgdn.errors.RankError: a process ended before it was here.
    """
    device = str(options["device"])
    rank = torchrun_rank()
    if rank is not None:
        group, leave = _join_torchrun(world, device)
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        rank_options = engine_options(options, runner, str(group.group_name), local_rank)
        if rank > 0:
            follow(model_dir, rank_options)
            leave()
            raise SystemExit(0)
        return Ranks([], leave, _nothing), rank_options
    if dist.is_initialized():
        raise RequestError(
            "[Engine] tensor_parallel: expected a process without a group of torch.distributed, or torchrun, got one "
            "that has a group: another engine of this process, perhaps"
        )
    processes: list[subprocess.Popen[bytes]] = []
    try:
        store = TCPStore(
            "127.0.0.1", 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_START_SECONDS)
        )
        threads = _threads_of_rank(world)
        for other in range(1, world):
            invitation = Invitation(other, world, store.port, threads, model_dir, options, _sizes(runner))
            processes.append(_start(invitation))
        _await_all(store, processes)
        torch.set_num_threads(threads)
        name = _join(store, 0, world, device)
        of_rank = torch.device(device)
        abort = _nothing if of_rank.type == "cpu" else partial(_abort_device, of_rank)
        return Ranks(processes, _leave_world, abort), engine_options(options, runner, name, local_rank=0)
    except BaseException:
        _end(processes, seconds=0)
        _leave_world()
        raise


def follow_invitation(invitation: Invitation) -> None:
    """Be the rank that another process has invited, until its engine ends. Raises what loading and steps raise."""
    _name_device(str(invitation.options["device"]))
    torch.set_num_threads(invitation.threads)
    store = TCPStore(
        "127.0.0.1",
        invitation.port,
        invitation.world,
        timeout=timedelta(seconds=_START_SECONDS),
        wait_for_workers=False,
    )
    store.set(_here(invitation.rank), "")
    name = _join(store, invitation.rank, invitation.world, str(invitation.options["device"]))
    runner = RunnerOptions(**invitation.runner)
    follow(invitation.model_dir, engine_options(invitation.options, runner, name, invitation.rank))


def follow(model_dir: str, options: _C.EngineOptions) -> None:
    """Load this rank's part of the model and compute what rank 0 says, until its engine ends."""
    _C.Follower.load(model_dir, options).follow()


class Ranks:
    """Rank 0's hold on the processes that it has started; none where torchrun has."""

    def __init__(
        self, processes: "Sequence[subprocess.Popen[bytes]]", leave: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        """`leave`: leaves the group at the end. `abort`: ends what waits on a device for a rank that has ended."""
        self._processes = list(processes)
        self._leave = leave
        self._abort = abort
        self._is_closing = False
        self._lock = threading.Lock()
        self._failure = ""
        self._callbacks: list[Callable[[str], None]] = []
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), name=f"xgdn-rank-{rank}", daemon=True).start()

    @property
    def process_ids(self) -> list[int]:
        """Of the ranks from 1 on."""
        return [process.pid for process in self._processes]

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Call back, from a thread of its own, when a rank ends before its time; at once if one has."""
        with self._lock:
            self._callbacks.append(callback)
            failure = self._failure
        if failure:
            callback(failure)

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        status = process.wait()
        with self._lock:
            if self._is_closing or self._failure:
                return
            self._failure = f"[Engine] tensor_parallel: rank {rank} (process {process.pid}) ended with status {status}"
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback(self._failure)
        self._abort()

    def close(self, engine: _C.Engine | None) -> None:
        """Let the ranks return, and end those that do not; the engine serves nobody from then on."""
        with self._lock:
            self._is_closing = True
        if engine is not None:
            engine.shut_down()
        has_failed = bool(self._failure)
        _end(self._processes, _END_SECONDS if engine is not None and not has_failed else 0)
        # A device that has waited for the ended rank says so again.
        with suppress(RuntimeError) if has_failed else nullcontext():
            self._leave()


def _join_torchrun(world: int, device: str) -> tuple[dist.ProcessGroup, Callable[[], None]]:
    """Return a group of torchrun's processes, and what leaves it: a group that the program has made stays."""
    started = int(os.environ["WORLD_SIZE"])
    if started != world:
        raise RequestError(
            f"[Engine] tensor_parallel: expected the number of torchrun's processes, {started}, got {world}"
        )
    backend = _backend(device)
    if dist.is_initialized():
        group = dist.new_group(backend=backend)
        return group, partial(dist.destroy_process_group, group)
    dist.init_process_group(backend)
    return _world_group(), _leave_world


def _join(store: TCPStore, rank: int, world: int, device: str) -> str:
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world)
    return str(_world_group().group_name)


def _leave_world() -> None:
    if dist.is_initialized():  # torch_npu leaves every group itself where the process ends before the engine does
        dist.destroy_process_group()


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _backend(device: str) -> str:
    """The backends of a group: what ranks tell each other is on the host, what they sum on the device."""
    kind = torch.device(device).type
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{_DEVICE_BACKENDS.get(kind, 'nccl')}"


def _threads_of_rank(world: int) -> int:
    """Threads of this process where somebody has set their number, else an equal share of those there are.

    One processor of a share of three or more is left to the connections between ranks: OpenMP's threads turn while they
    wait, and beside as many of them as processors a sum over the ranks waits for milliseconds.
    """
    threads = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS") or threads != _THREADS_BY_DEFAULT:
        return threads
    share = threads // world
    return share - 1 if share > 2 else max(share, 1)


def _sizes(runner: RunnerOptions) -> dict[str, Any]:
    names = (
        "max_batch_size",
        "max_cached_tokens",
        "kv_block_size",
        "max_tokens_per_step",
        "prefix_cache_slots",
        "poison_freed_slots",
    )
    return {name: getattr(runner, name) for name in names}


def _nothing() -> None:
    pass


def _abort_device(device: torch.device) -> None:
    """End what waits on a device; a connection between hosts tells of its end by itself."""
    if not dist.is_initialized():
        return
    backend: Any = _world_group()._get_backend(device)
    if device.type == "npu":  # whose abort is not Backend's: torch_npu gives it another name
        backend.abort_hccl_comm("a rank has ended")
    else:
        backend.abort()


def _here(rank: int) -> str:
    return f"xgdn/here/{rank}"


def _start(invitation: Invitation) -> "subprocess.Popen[bytes]":
    # A session of its own: a terminal's Ctrl-C is for rank 0, which ends the others.
    process = subprocess.Popen(
        [sys.executable, "-m", "xgdn.follower"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, as _await_all finds
        process.stdin.write(pickle.dumps(invitation))
        process.stdin.flush()
    return process


def _await_all(store: TCPStore, processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    end = time.monotonic() + _START_SECONDS
    keys = [_here(rank) for rank in range(1, len(processes) + 1)]
    while not store.check(keys):
        for rank, process in enumerate(processes, 1):
            if process.poll() is not None:
                raise RankError(
                    f"[Engine] tensor_parallel: expected {len(processes) + 1} processes, got rank {rank} that ended "
                    f"with status {process.returncode} while it started"
                )
        if time.monotonic() > end:
            raise RankError(
                f"[Engine] tensor_parallel: expected all processes to start within {_START_SECONDS:g} seconds"
            )
        time.sleep(_POLL_SECONDS)


def _end(processes: "Sequence[subprocess.Popen[bytes]]", seconds: float) -> None:
    """Wait so long for the processes to end, and kill those that do not."""
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
