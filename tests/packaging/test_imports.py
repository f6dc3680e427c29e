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
