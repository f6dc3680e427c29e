"""The communication schedulers by name. A new one is one file and one row here."""

from ormo_server.core.schedulers.asynchronous import Asynchronous
from ormo_server.core.schedulers.base import Scheduler
from ormo_server.core.schedulers.bounded_staleness import BoundedStaleness
from ormo_server.core.schedulers.synchronous import Synchronous

SCHEDULERS: dict[str, type[Scheduler]] = {
    "asynchronous": Asynchronous,
    "synchronous": Synchronous,
    "bounded-staleness": BoundedStaleness,
}

__all__ = ["SCHEDULERS", "Scheduler"]
