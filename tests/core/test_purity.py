"""Who may know of whom: the core of nothing that acts, server and worker not of each other, nobody of pickle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ormo_protos
import ormo_server
import ormo_worker

PROTOS, SERVER, WORKER = (Path(package.__path__[0]) for package in (ormo_protos, ormo_server, ormo_worker))
CORE = SERVER / "core"

ACTS = (
    "asyncio",
    "datetime",
    "grpc",
    "io",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "prometheus_client",
    "queue",
    "random",
    "safetensors",
    "secrets",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "uuid",
)
SHELLS = ("ormo_server.service", "ormo_server.store", "ormo_server.sim", "ormo_server.metrics", "ormo_server.config")
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
PICKLING_CALLS = ("torch.load", "torch.save", "numpy.load", "np.load")


def imports(source: str) -> Iterator[str]:
    """Every module that the source imports, and every name that it imports from one, in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_of(source: str, forbidden: tuple[str, ...]) -> list[str]:
    return [name for name in imports(source) if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden)]


def calls(source: str) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def offenders(package: Path, forbidden: tuple[str, ...]) -> dict[str, list[str]]:
    """What each file of the package imports of what is forbidden to it."""
    files = sorted(package.rglob("*.py"))
    assert files, f"no source under {package}"
    found = {file.name: imported_of(file.read_text(encoding="utf-8"), forbidden) for file in files}
    return {name: names for name, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    ["import time", "import os.path", "from time import monotonic", "from os import path as p", "def f():\n import os"],
)
def test_an_import_is_found_in_all_its_forms(source: str) -> None:
    assert imported_of(source, ("time", "os"))


@pytest.mark.parametrize("source", ["import timeit", "from typing import Any", "time = 1"])
def test_what_only_looks_like_an_import_is_not_found(source: str) -> None:
    assert imported_of(source, ("time", "os")) == []


def test_the_core_imports_nothing_that_acts_and_neither_shell() -> None:
    assert offenders(CORE, ACTS + SHELLS) == {}


def test_the_core_imports_only_itself_torch_and_the_contract_besides_the_standard_library() -> None:
    allowed = ("ormo_server.core", "ormo_protos", "torch")
    standard = (
        "abc",
        "ast",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "math",
        "statistics",
        "typing",
    )
    found = {
        (file.name, name)
        for file in CORE.rglob("*.py")
        for name in imports(file.read_text(encoding="utf-8"))
        if not any(name == good or name.startswith(f"{good}.") for good in allowed + standard)
    }
    assert found == set()


def test_the_core_opens_no_file_prints_nothing_and_draws_no_random_number() -> None:
    forbidden = ("open", "print", "input", "torch.rand", "torch.randn", "torch.randint", "torch.randperm")
    found = [(file.name, call) for file in CORE.rglob("*.py") for call in calls(file.read_text()) if call in forbidden]
    assert found == []


def test_server_and_worker_do_not_import_each_other_and_the_contract_imports_neither() -> None:
    assert offenders(SERVER, ("ormo_worker",)) == {}
    assert offenders(WORKER, ("ormo_server",)) == {}
    assert offenders(PROTOS, ("ormo_server", "ormo_worker")) == {}


@pytest.mark.parametrize("package", [PROTOS, SERVER, WORKER], ids=lambda path: path.name)
def test_nothing_is_pickled_or_unpickled(package: Path) -> None:
    assert offenders(package, PICKLES) == {}
    found = [(f.name, call) for f in package.rglob("*.py") for call in calls(f.read_text()) if call in PICKLING_CALLS]
    assert found == []
