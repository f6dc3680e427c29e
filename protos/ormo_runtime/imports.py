"""What a user names by an import path: a task, a tracker."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from ormo_runtime.settings import UsageError


class ImportPathError(UsageError):
    """A path leads to no module."""


def imported(what: str, module: str, *, program: str = "the program") -> ModuleType:
    """Import what a user named.

    The current directory is importable, as it is for ASGI servers; of a file, its folder is.

    Args:
        what: is looked for, as in "the task 'mine:Task'", for sentences.
        module: "package.module" or "path/to/file.py".
        program: whom to start elsewhere.

    Raises:
        ImportPathError: it is not there, or something that it imports is not. What a user's own module raises
            otherwise comes through as it is, with its traceback.
    """
    _make_importable(Path.cwd())
    if module.endswith(".py"):
        return _import_file(what, Path(module), program)
    return _import_module(what, module, program)


def _import_module(what: str, module: str, program: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportPathError(
            f"{what} can't be imported ({error}): start {program} in the folder that "
            f"{module.split('.')[0]!r} is in, or install what is missing"
        ) from error


def _import_file(what: str, file: Path, program: str) -> ModuleType:
    if not file.is_file():
        raise ImportPathError(
            f"{what} names the file {file.resolve()}, which does not exist: correct the path, "
            f"which starts from {Path.cwd()}"
        )
    # By its folder and not by its location alone: loader processes have to import the module again.
    _make_importable(file.resolve().parent)
    module = _import_module(what, file.stem, program)
    if module.__file__ is None or Path(module.__file__).resolve() != file.resolve():
        raise ImportPathError(
            f"the file of {what} can't be imported, because Python already has another module "
            f"{file.stem!r} ({module.__file__ or 'built in'}): rename the file"
        )
    return module


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
