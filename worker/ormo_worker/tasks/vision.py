"""The one place that imports torchvision, and only when a task needs it."""

import importlib
import sys
from types import ModuleType

import torch

from ormo_worker.tasks.task import TaskError

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_OPERATOR_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Return torchvision, also beside a CPU build of PyTorch, where a plain import of 0.28 fails.

    The wheel on PyPI is a CUDA build: its compiled operators do not load there, and registering their
    shapes raises. Data sets need none of them, so declaring the two operators without code is enough.

    Raises:
        TaskError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise TaskError(
            f"This task needs torchvision, which cannot be imported ({error}): run "
            "pip install 'ormo-parameter-server[vision]'."
        ) from error
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    for operator in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(operator, _OPERATOR_SCHEMA)  # PyTorch keeps it for as long as the process lives
    for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[module]  # left half-loaded by the failed import
