"""The worker's side of a parameter server with ordered momentum.

`RemoteOptimizer` turns a PyTorch training loop into a worker; `ParameterClient` is what it talks through;
a `Task` is what `ormo-worker run` trains.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for those who read the code without running it; the table below is what is run
    from ormo_runtime.process import keep_freed_memory as keep_freed_memory
    from ormo_runtime.tls import Credentials as Credentials
    from ormo_worker.client.api import ParameterClient as ParameterClient
    from ormo_worker.client.arguments import Patience as Patience
    from ormo_worker.errors import OrmoError as OrmoError
    from ormo_worker.errors import RunFinished as RunFinished
    from ormo_worker.pytorch.module import manifest_of as manifest_of
    from ormo_worker.pytorch.optimizer import RemoteOptimizer as RemoteOptimizer
    from ormo_worker.pytorch.schedule import ServerSchedule as ServerSchedule
    from ormo_worker.tasks import ClassificationTask as ClassificationTask
    from ormo_worker.tasks import Score as Score
    from ormo_worker.tasks import Task as Task
    from ormo_worker.tasks import TaskError as TaskError
    from ormo_worker.tasks import load_task as load_task

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
    "ServerSchedule": "ormo_worker.pytorch.schedule",
    "Task": "ormo_worker.tasks",
    "TaskError": "ormo_worker.tasks",
    "keep_freed_memory": "ormo_runtime.process",
    "load_task": "ormo_worker.tasks",
    "manifest_of": "ormo_worker.pytorch.module",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ormo_worker' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
