"""No module needs itself to be imported: any of them can be the first."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {path.parent.name: path.parent for path in ROOT.glob("*/ormo_*/__init__.py") if path.parts[-3] != "tests"}


def sources() -> dict[str, str]:
    """The text of each module, by its name."""
    found = {}
    for package in OURS.values():
        for path in package.rglob("*.py"):
            found[".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")] = (
                path.read_text(encoding="utf-8")
            )
    return found


def imported(text: str, known: Mapping[str, object]) -> Iterator[str]:
    """Which of the known modules this one imports as it is imported itself."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names if alias.name in known)
        elif isinstance(statement, ast.ImportFrom) and statement.module in known:
            inner = [f"{statement.module}.{alias.name}" for alias in statement.names]
            yield from [name for name in inner if name in known] or [statement.module]


def cycle(modules: Mapping[str, str]) -> list[str]:
    """Modules each of which imports the next, and the last the first; empty if there are none."""
    try:
        TopologicalSorter({name: set(imported(text, modules)) for name, text in modules.items()}).prepare()
    except CycleError as found:
        return list(found.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = sources()
    assert set(OURS) == {"ormo_protos", "ormo_runtime", "ormo_server", "ormo_worker"}
    assert len(modules) > 100
    assert cycle(modules) == []


@pytest.mark.parametrize("line", ["from ormo import b", "from ormo.b import x", "import ormo.b"])
def test_a_cycle_is_found(line: str) -> None:
    modules = {"ormo": "", "ormo.a": line, "ormo.b": "import os\nfrom ormo.c import y", "ormo.c": "import ormo.a"}
    assert set(cycle(modules)) == {"ormo.a", "ormo.b", "ormo.c"}
    assert cycle(modules | {"ormo.c": "def later():\n    import ormo.a"}) == []


# What the optimizer may know of the client: its public names, and what callers give it, which needs no gRPC.
OF_THE_CLIENT = ["ormo_worker.client", "ormo_worker.client.arguments"]
# Folders of the worker, and what each may not import, wherever in a module it does so.
FORBIDDEN = {
    "client": ("torch.optim", "ormo_worker.pytorch", "ormo_worker.tasks", "ormo_worker.local", "ormo_worker.settings"),
    "pytorch": ("grpc", "ormo_worker.local", "ormo_worker.settings", "ormo_worker.training", "ormo_worker.evaluation"),
    "tasks": ("grpc", "ormo_worker.client", "ormo_worker.pytorch", "ormo_worker.local", "ormo_worker.settings"),
}


def named_in_imports(text: str) -> Iterator[tuple[str, str]]:
    """Modules that are imported anywhere in a module, and what of them with their names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", f"{node.module}.{alias.name}") for alias in node.names)


def strangers(folder: str, text: str) -> list[str]:
    """What a module of this folder of the worker imports and may not."""
    found = [
        name
        for _, name in named_in_imports(text)
        if any(name == other or name.startswith(f"{other}.") for other in FORBIDDEN[folder])
    ]
    if folder == "pytorch":
        found += [
            module
            for module, _ in named_in_imports(text)
            if module.startswith("ormo_worker.client") and module not in OF_THE_CLIENT
        ]
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_folder_of_the_worker_imports_what_stands_above_it(folder: str) -> None:
    modules = {name: text for name, text in sources().items() if name.startswith(f"ormo_worker.{folder}")}
    assert len(modules) >= 7
    assert {name: strangers(folder, text) for name, text in modules.items() if strangers(folder, text)} == {}


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("client", "def later():\n    from torch import optim"),
        ("client", "from ormo_worker.pytorch.module import manifest_of"),
        ("pytorch", "import grpc"),
        ("pytorch", "from ormo_worker.client.connection import Connection"),
    ],
)
def test_an_import_of_what_stands_above_is_found(folder: str, line: str) -> None:
    assert len(strangers(folder, line)) == 1
