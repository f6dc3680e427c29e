"""What the server exports to Prometheus. Names, kinds and meanings are all in this package; `table` lists them."""

from prometheus_client import CollectorRegistry

from ormo_server.metrics.collector import RunCollector
from ormo_server.metrics.families import (
    Calls,
    Checkpoints,
    Families,
    Gradients,
    JournalMetrics,
    MirrorMetrics,
    Streams,
    Traffic,
    Upkeep,
)
from ormo_server.metrics.process import Process

__all__ = ["Metrics"]

WORKERS_WITH_SERIES = 100


class Metrics:
    """The server's metrics, in a registry of their own.

    Args:
        workers_with_series: how many workers have series of their own.

    Attributes:
        registry: what is scraped.
        run: what is read from the state at each scrape, of the run and of each worker.
        gradients: how they land.
        traffic: what comes and goes, and how long its stages take.
        upkeep: locks, members, background work.
        checkpoints: where the run is safe.
        journal: what came since.
        mirror: copies of checkpoints elsewhere.
        streams: how many are open.
        calls: gRPC's.
        process: build, settings, memory.
        settle: counts what the hot path has noted, as each scrape does; to be called now and then, or memory fills.
    """

    def __init__(self, workers_with_series: int = WORKERS_WITH_SERIES) -> None:
        self.registry = CollectorRegistry()
        self.run = RunCollector(self.registry, workers_with_series)  # first: reading the run counts its last gradients
        families = Families(self.registry)
        self.settle = families.settle
        self.gradients = Gradients(families)
        self.traffic = Traffic(families)
        self.upkeep = Upkeep(families)
        self.checkpoints = Checkpoints(families)
        self.journal = JournalMetrics(families)
        self.mirror = MirrorMetrics(families)
        self.streams = Streams(families)
        self.calls = Calls(self.registry)
        self.process = Process(families, self.registry)
