"""From a task's name to the task: the built-in ones by a short name, others by their import path."""

import importlib
import inspect
import operator
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from ormo_worker.tasks.task import Task, TaskError

# Import paths and not classes: naming a task must not import what the other tasks need.
BUILT_IN = {
    "digits": "ormo_worker.tasks.digits:Digits",
    "cifar10": "ormo_worker.tasks.cifar10:Cifar10",
    "image-folder": "ormo_worker.tasks.image_folder:ImageFolder",
    "image-folder-cnn": "ormo_worker.tasks.small_cnn:SmallCnnFolder",
}
TASK_METHODS = ("build_model", "train_set", "test_set", "loss", "score", "weight_decay_scale")


def load_task(name: str, data_dir: Path | None = None) -> Task:
    """Make the task that a user named.

    The current directory is importable, as it is for ASGI servers; of a file, its folder is.

    Args:
        name: a key of `BUILT_IN`, "package.module:attribute" or "path/to/file.py:attribute"; the
            attribute is a class or function that takes the keyword `data_dir`.
        data_dir: handed to the task, which knows whether it needs one.

    Returns:
        What the attribute made: a `Task`, or an object with all of its methods.

    Raises:
        TaskError: the name leads to no task, or the task refused its data folder. What a user's own
            module raises otherwise comes through as it is, with its traceback.
    """
    factory = _find_factory(name)
    _check_factory(name, factory)
    task = factory(data_dir=data_dir)
    missing = [method for method in TASK_METHODS if not callable(getattr(task, method, None))]
    if missing:
        raise _incomplete(name, missing)
    return cast(Task, task)


def _find_factory(name: str) -> Any:
    module_name, _, attribute = BUILT_IN.get(name, name).rpartition(":")
    if not module_name or not attribute:
        raise TaskError(
            f"There is no task named {name!r}: use one of {', '.join(BUILT_IN)}, or the import path of "
            "your own, as in 'package.module:MyTask' or 'path/to/file.py:MyTask'."
        )
    module = _import(name, module_name)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise TaskError(
            f"The task {name!r} was not found, for its module ({module.__file__}) has no {attribute!r}: put "
            "the name of a Task class, or of a function that returns a task, after the colon."
        ) from error


def _import(name: str, module_name: str) -> ModuleType:
    _make_importable(Path.cwd())
    if module_name.endswith(".py"):
        return _import_file(name, Path(module_name))
    return _import_module(name, module_name)


def _import_module(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise TaskError(
            f"The task {name!r} cannot be imported ({error}): start the worker in the folder that "
            f"{module_name.split('.')[0]!r} lies in, or install what is missing."
        ) from error


def _import_file(name: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise TaskError(
            f"The task {name!r} names the file {file.resolve()}, which does not exist: correct the path, "
            f"which starts from {Path.cwd()}."
        )
    # By its folder and not by its location alone: loader processes have to import the module again.
    _make_importable(file.resolve().parent)
    module = _import_module(name, file.stem)
    if module.__file__ is None or Path(module.__file__).resolve() != file.resolve():
        raise TaskError(
            f"The file of the task {name!r} cannot be imported, because Python already has another module "
            f"{file.stem!r} ({module.__file__ or 'built in'}): rename the file."
        )
    return module


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _check_factory(name: str, factory: Any) -> None:
    if inspect.isabstract(factory):
        raise _incomplete(name, sorted(factory.__abstractmethods__))
    try:
        inspect.signature(factory).bind(data_dir=None)
    except (TypeError, ValueError) as error:  # not callable, or nothing is known of its arguments
        raise TaskError(
            f"The task {name!r} cannot be made ({error}): it must be a class or function that can be "
            "called with the keyword data_dir alone, a Path or None."
        ) from error


def _incomplete(name: str, missing: list[str]) -> TaskError:
    return TaskError(
        f"The task {name!r} lacks {', '.join(missing)}: a task is a subclass of ormo_worker.tasks.Task, "
        f"or has the methods {', '.join(TASK_METHODS)}."
    )
