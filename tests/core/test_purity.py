"""Who may know of whom: the core of nothing that acts, server and worker not of each other, nobody of pickle."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ormo_protos
import ormo_runtime
import ormo_server
import ormo_worker

PACKAGES = (ormo_protos, ormo_runtime, ormo_server, ormo_worker)
PROTOS, RUNTIME, SERVER, WORKER = (Path(package.__path__[0]) for package in PACKAGES)
DEPLOY = Path(__file__).parents[2] / "deploy"
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
SHELLS = ("ormo_server.service", "ormo_server.store", "ormo_server.sim", "ormo_server.metrics", "ormo_server.settings")
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
# What runs code that it finds in a file, or writes such files, whoever it is imported by and whatever it is called.
UNPICKLING = (
    "numpy.lib.format.read_array",
    "numpy.lib.npyio",
    "numpy.load",
    "numpy.save",
    "numpy.savez",
    "numpy.savez_compressed",
    "pandas.io.pickle",
    "pandas.read_pickle",
    "pandas.to_pickle",
    "torch.export.load",
    "torch.hub",
    "torch.jit.load",
    "torch.jit.save",
    "torch.load",
    "torch.package",
    "torch.save",
    "torch.serialization",
    "torch.utils.model_zoo",
)
# Of whatever object: a DataFrame has the second as a method.
METHOD_ENDINGS = (".read_pickle", ".to_pickle")


def imports(source: str) -> Iterator[str]:
    """Every module that the source imports, and every name that it imports from one, in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_of(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def imported_of(source: str, forbidden: tuple[str, ...]) -> list[str]:
    return [name for name in imports(source) if is_of(name, forbidden)]


def aliases(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, in full."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.asname: one.name for one in node.names if one.asname}
    return found


def names(source: str, *, called: bool = False) -> list[str]:
    """Every dotted name in the source, or only those that it calls, with aliases resolved."""
    tree = ast.parse(source)
    known, nodes = aliases(tree), list(ast.walk(tree))
    used = [node.func for node in nodes if isinstance(node, ast.Call)] if called else nodes
    dotted = (ast.unparse(node).partition(".") for node in used if isinstance(node, ast.Name | ast.Attribute))
    return [known.get(first, first) + dot + rest for first, dot, rest in dotted]


def pickling(source: str) -> list[str]:
    """Whatever the source could read or write pickles by. Used, not only called: it may be handed on."""
    used = [name for name in names(source) if is_of(name, UNPICKLING) or name.endswith(METHOD_ENDINGS)]
    return imported_of(source, PICKLES + UNPICKLING) + stars(source) + used


def stars(source: str) -> list[str]:
    """Imports of all names there are, of modules that have a forbidden one."""
    wanted = {name.rpartition(".")[0] for name in UNPICKLING}
    return [name for name in imports(source) if name.endswith(".*") and name[:-2] in wanted]


def sources(package: Path) -> dict[str, str]:
    """Every file by its path: several have one name, and each counts."""
    files = sorted(package.rglob("*.py"))
    assert files, f"no source under {package}"
    return {str(file.relative_to(package)): file.read_text(encoding="utf-8") for file in files}


def offenders(package: Path, offences: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """What each file of the package has of what is forbidden to it."""
    found = {path: offences(source) for path, source in sources(package).items()}
    return {path: names for path, names in found.items() if names}


def importing(package: Path, *forbidden: str) -> dict[str, list[str]]:
    """What each file of the package imports of what is forbidden to it."""
    return offenders(package, lambda source: imported_of(source, forbidden))


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder, source in {"a": "import os", "b": "import time", "c": ""}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(source)
    assert importing(tmp_path, "os", "time") == {"a/__init__.py": ["os"], "b/__init__.py": ["time"]}


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
    assert importing(CORE, *ACTS, *SHELLS) == {}


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
        "typing_extensions",  # `override`, which the standard library has from Python 3.12 on
    )

    def others(source: str) -> list[str]:
        return [name for name in imports(source) if not is_of(name, allowed + standard)]

    assert offenders(CORE, others) == {}


def test_the_core_opens_no_file_prints_nothing_and_draws_no_random_number() -> None:
    forbidden = ("open", "print", "input", "torch.rand", "torch.randn", "torch.randint", "torch.randperm")
    assert offenders(CORE, lambda source: [name for name in names(source, called=True) if name in forbidden]) == {}


def test_server_and_worker_do_not_import_each_other_and_what_both_stand_on_imports_neither() -> None:
    assert importing(SERVER, "ormo_worker") == {}
    assert importing(WORKER, "ormo_server") == {}
    assert importing(PROTOS, "ormo_runtime", "ormo_server", "ormo_worker") == {}
    assert importing(RUNTIME, "ormo_server", "ormo_worker") == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load",
        "from torch import load as get\nget(path)",
        "from torch import *",
        "import torch\nread = torch.load",
        "import torch\nfor one in map(torch.load, paths): pass",
        "import torch\ntorch.jit.load(path)",
        "from torch import jit\njit.load(path)",
        "import torch.jit as compiled\ncompiled.load(path)",
        "import torch\ntorch.hub.load(repository, model)",
        "from torch import hub",
        "import torch.hub",
        "from torch.serialization import load",
        "import torch\ntorch.save(model, path)",
        "from numpy import load",
        "import numpy as np\nnp.load(path)",
        "import numpy\nnumpy.save(path, array)",
        "import pandas\npandas.read_pickle(path)",
        "import pandas as pd\npd.read_pickle(path)",
        "from pandas import read_pickle",
        "frame.to_pickle(path)",
        "def f():\n    import torch as t\n    return t.load(path)",
    ],
)
def test_a_pickle_is_found_by_whatever_name(source: str) -> None:
    assert pickling(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nmodel.load_state_dict(torch.zeros(1))",
        "from safetensors.torch import load, load_file, save_file\nload(data)",
        "import json as torch\ntorch.load(file)",
        "import numpy as np\nnp.loadtxt(path)",
        "from torch.jit import script",
        "from pandas import read_csv",
    ],
)
def test_what_only_looks_like_a_pickle_is_not_found(source: str) -> None:
    assert pickling(source) == []


# Files of torch.save are made for users, and nothing but tensors is read from them; the ranks of one worker, which are
# one program, tell each other things as torch.distributed itself does.
PICKLING = {"ormo_server/store/weights.py", "ormo_server/export.py", "ormo_worker/pytorch/ranks.py"}


@pytest.mark.parametrize("package", [PROTOS, RUNTIME, SERVER, WORKER, DEPLOY], ids=lambda path: path.name)
def test_nothing_is_pickled_or_unpickled_but_for_a_reason(package: Path) -> None:
    found = {f"{package.name}/{path}" for path in offenders(package, pickling)}
    assert found == {path for path in PICKLING if path.startswith(f"{package.name}/")}


def test_what_torch_save_has_written_is_read_as_tensors_alone() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse((SERVER / "store" / "weights.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [ast.unparse(call.keywords[-1]) for call in calls] == ["weights_only=True"]
