"""What runs, with which settings, in how much memory; and the port that says so, to Prometheus and to probes."""

import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry, GCCollector, Info, PlatformCollector, ProcessCollector, make_wsgi_app

from ormo_runtime.http_port import HttpPort
from ormo_server.core.method import MemoryNeed
from ormo_server.metrics.families import PREFIX, Families

PACKAGE = "ormo-parameter-server"
# A container's limit: version 2 of control groups, then version 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def package_version() -> str:
    """Of the installed package."""
    return version(PACKAGE)


def memory_limit_bytes(limits: tuple[Path, ...] = _LIMITS, meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """What this process may take before the system ends it: the container's limit or all that the machine has.

    Returns:
        Bytes; None where the system does not tell.
    """
    found = [_number(path) for path in limits] + [_machine_bytes(meminfo)]
    return min((number for number in found if number is not None), default=None)


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def _machine_bytes(meminfo: Path) -> float | None:
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    totals = [line.split() for line in lines if line.startswith("MemTotal:")]
    return float(totals[0][1]) * 1024 if totals else None


def resident_bytes(statm: Path = Path("/proc/self/statm"), page_bytes: int | None = None) -> int:
    """Memory that this process has; 0 where the system does not tell."""
    try:
        pages = int(statm.read_text(encoding="utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * (page_bytes or _page_bytes())


def _page_bytes() -> int:
    import resource  # not there on every system that has no /proc either

    return resource.getpagesize()


class Process:
    """Build, settings and memory."""

    def __init__(self, families: Families, registry: CollectorRegistry) -> None:
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        limit = memory_limit_bytes()
        if limit is not None:
            families.gauge(
                "memory_limit_bytes",
                "Memory that this process may take: the container's limit or the machine's memory.",
            ).set(limit)
        self._need = families.gauge("memory_need_bytes", "Memory that the run needs at most, by the formula.", "part")
        self._settings = Info(
            f"{PREFIX}settings", "How the run is trained, a label for each setting.", registry=registry
        )
        Info(f"{PREFIX}build", "Versions that run.", registry=registry).info(
            {
                "version": package_version(),
                "torch": torch.__version__,
                "grpc": grpc.__version__,
                "python": platform.python_version(),
            }
        )

    def settings(self, values: Mapping[str, str]) -> None:
        """Say how the run is trained."""
        self._settings.info(dict(values))

    def needs(self, need: MemoryNeed) -> None:
        """Say what the model needs."""
        self._need.labels("state").set(need.state_bytes)
        self._need.labels("exchanges").set(need.exchange_bytes)
        self._need.labels("checkpoint").set(need.checkpoint_bytes)


ALIVE, READY = "/alive", "/ready"


def serve_over_http(
    host: str, port: int, registry: CollectorRegistry, alive: Callable[[], bool], ready: Callable[[], bool]
) -> HttpPort:
    """Answer until the port is closed.

    Args:
        host: to listen on.
        port: to listen on; 0 picks a free one.
        registry: of the metrics.
        alive: whether calls can be answered at all; `/alive` says 503 where not, and so does `/ready`.
        ready: whether new calls are welcome.

    Raises:
        OSError, OverflowError, RuntimeError: see `HttpPort`.
    """
    metrics: Any = make_wsgi_app(registry)
    probes: dict[str, Callable[[], bool]] = {ALIVE: alive, READY: lambda: alive() and ready()}

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        probe = probes.get(environ["PATH_INFO"])
        if probe is None:
            answered: Iterable[bytes] = metrics(environ, start_response)
            return answered
        good = probe()
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"yes\n" if good else b"no\n"]

    return HttpPort(host, port, answer)
