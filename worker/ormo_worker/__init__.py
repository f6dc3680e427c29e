"""The worker's side of a parameter server with ordered momentum.

`RemoteOptimizer` turns a PyTorch training loop into a worker; `ParameterClient` is what it talks through;
a `Task` is what `ormo-worker run` trains.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ormo_runtime.process import keep_freed_memory
    from ormo_runtime.tls import Credentials
    from ormo_worker.client.api import ParameterClient
    from ormo_worker.client.arguments import Patience
    from ormo_worker.errors import OrmoError, RunFinished
    from ormo_worker.pytorch.module import manifest_of
    from ormo_worker.pytorch.optimizer import RemoteOptimizer
    from ormo_worker.tasks import ClassificationTask, Score, Task, TaskError, load_task

__all__ = [
    "ClassificationTask",
    "Credentials",
    "OrmoError",
    "ParameterClient",
    "Patience",
    "RemoteOptimizer",
    "RunFinished",
    "Score",
    "Task",
    "TaskError",
    "keep_freed_memory",
    "load_task",
    "manifest_of",
]

# Imported when first used: `ormo-worker --help` need not wait for PyTorch.
_HOMES = {
    "ClassificationTask": "ormo_worker.tasks",
    "Credentials": "ormo_runtime.tls",
    "OrmoError": "ormo_worker.errors",
    "ParameterClient": "ormo_worker.client.api",
    "Patience": "ormo_worker.client.arguments",
    "RemoteOptimizer": "ormo_worker.pytorch.optimizer",
    "RunFinished": "ormo_worker.errors",
    "Score": "ormo_worker.tasks",
    "Task": "ormo_worker.tasks",
    "TaskError": "ormo_worker.tasks",
    "keep_freed_memory": "ormo_runtime.process",
    "load_task": "ormo_worker.tasks",
    "manifest_of": "ormo_worker.pytorch.module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ormo_worker' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
