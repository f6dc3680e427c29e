"""What the system must give this process before it serves: threads and file descriptors.

Both are asked for before the port opens. Who ran out of them while it serves could not answer for itself any more.
"""

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from ormo_runtime.process import StartedPool
from ormo_server.settings import ServerSettings

# Calls that hold no thread for long (Join, heartbeats, health, status) share these.
_RESERVE_THREADS = 32
# Those outside the pool. Measured on 2 cores with 64 workers, 200 silent connections and a flood of short calls: 17 of
# ours (upkeep, metrics, copies, the end of a stop, ...) and 6 of gRPC's. It has one for each core in place of four of
# these, up to 16, and more while work waits for one.
_OTHER_THREADS = 64
# Descriptors for everything but connections: the journal has 4 and at times 10, a checkpoint 5, the port for metrics 9,
# gRPC 12, and then there are lists and certificates that are read again, the trace, /proc, modules, and logs.
_OWN_DESCRIPTORS = 64
# Connections of operators, probes and strangers. Each costs some 30 kB, so that a flood of them costs 10 MB.
_OTHER_CONNECTIONS = 256
# gRPC counts for each address that a name such as localhost has.
_ADDRESSES = 2
# The fewest elements that PyTorch has a thread of its own for.
_ELEMENTS_PER_THREAD = 1 << 15
# The limit of a container or a systemd unit: version 2 of control groups, then version 1.
_TASKS = (Path("/sys/fs/cgroup/pids.max"), Path("/sys/fs/cgroup/pids/pids.max"))


class TooFewResources(RuntimeError):
    """The system does not give what is needed; the sentence says how much that is."""


def worker_streams(settings: ServerSettings) -> int:
    """How many streams workers may have open at once.

    Each slot counts twice: after a broken connection the new stream may come before the old one is known to be dead.
    """
    return 2 * settings.max_workers * settings.slots_per_worker


def calls_per_connection(settings: ServerSettings) -> int:
    """How many calls go on at once in one connection; HTTP/2 lets further ones wait there, in the client.

    A worker has a stream for each slot, twice for a moment, and heartbeats; the rest is for those who share one.
    """
    return 2 * settings.slots_per_worker + _RESERVE_THREADS


def raise_limit_of_descriptors() -> None:
    """Have as many descriptors as the system gives without being asked for more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit besides
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_connections(settings: ServerSettings) -> int:
    """How many connections there may be on an address of the port for gRPC.

    As many as workers and readers have, twice, for those that are broken and not yet known to be; and some others. Less
    where the limit of descriptors leaves less, so that one for the journal can always be had.

    Raises:
        TooFewResources: not each worker and reader could have one.
    """
    people = settings.max_workers + settings.max_readers
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * people + _OTHER_CONNECTIONS
    if limit == resource.RLIM_INFINITY:
        return wanted
    taken = len(os.listdir("/dev/fd")) + _OWN_DESCRIPTORS  # noqa: PTH208 - names are all that is needed
    left = (limit - taken) // _ADDRESSES
    if left < people:
        raise TooFewResources(
            f"this server needs {taken + _ADDRESSES * people} file descriptors, and may have {limit}: raise the limit "
            "(`ulimit -n`), or lower --max-workers or --max-readers"
        )
    return min(wanted, left)


def threads_needed(settings: ServerSettings) -> int:
    """How many the server has at most. With --threads, each of its own that computes has so many of PyTorch's."""
    return settings.threads * (_pool_size(settings) + _OTHER_THREADS)


def _pool_size(settings: ServerSettings) -> int:
    return worker_streams(settings) + settings.max_readers + _RESERVE_THREADS


def pool_of_threads(settings: ServerSettings) -> StartedPool:
    """The threads that calls are answered in, all of them, where the system has enough for everything else besides.

    Raises:
        TooFewResources: it has not.
    """
    size, needed = _pool_size(settings), threads_needed(settings)
    try:
        # Whatever limits them, nested control groups included, limits these too, and there is no other way to ask.
        StartedPool(needed, "trial").shutdown()
        return StartedPool(size, "grpc", _pytorch_threads(settings.threads) if settings.threads > 1 else None)
    except RuntimeError as error:
        raise TooFewResources(
            f"this server needs {needed} threads, and the system does not give it that many ({_limits_of_threads()}): "
            "raise the limit of processes, or lower --max-workers, --slots-per-worker, --max-readers or --threads"
        ) from error


def _pytorch_threads(count: int) -> Callable[[], object]:
    """What has PyTorch start those of the thread that calls it. It ends the process when it can't: better now."""
    return torch.zeros(count * _ELEMENTS_PER_THREAD, dtype=torch.float32, device="cpu").neg_


def _limits_of_threads() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    own = "no limit" if soft == resource.RLIM_INFINITY else str(soft)
    tasks = next((path.read_text().strip() for path in _TASKS if path.exists()), "not known")
    return f"`ulimit -u`, for all of this user's programs: {own}; limit of the container: {tasks}"
