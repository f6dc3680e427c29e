"""The three files of versions agree with what `pyproject.toml` allows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
# What only checks or generates: its versions are those of constraints.txt alone.
CHECKERS = {"mypy", "ruff"}
FIXED = ("torch", "torchvision")
# Extras that are tested as pinned in constraints.txt alone.
PINNED = ("bench", "buckets", "deploy", "docs", "fuzz", "integrations", "ray")


def requirements(text: str) -> dict[str, Requirement]:
    """Every direct dependency, of the package and of the extras whose dependencies are tested at both ends."""
    project = tomllib.loads(text)["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra not in PINNED]
    found = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    return {canonicalize_name(one.name): one for one in found}


def pins(text: str) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    names = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) for name, _, version in names}


def lower_bound(one: Requirement) -> Version:
    (bound,) = [specifier.version for specifier in one.specifier if specifier.operator == ">="]
    return Version(bound)


def wrong_lowest(project: str, lowest: str) -> list[str]:
    """Dependencies that `make test-lowest` does not test at their lower bound."""
    pinned = pins(lowest)
    tested = {
        name: one
        for name, one in requirements(project).items()
        if name not in CHECKERS and not name.startswith("types-") and name not in FIXED
    }
    return [name for name, one in tested.items() if pinned.get(name) != lower_bound(one)]


def outside_range(project: str, constraints: str) -> list[str]:
    """Dependencies that are not pinned, or at a version that pyproject.toml does not allow."""
    pinned = pins(constraints)
    return [name for name, one in requirements(project).items() if pinned.get(name, Version("0")) not in one.specifier]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_lowest_versions_are_the_lower_bounds() -> None:
    assert wrong_lowest(text("pyproject.toml"), text("constraints-lowest.txt")) == []


def test_every_dependency_is_pinned_within_its_range() -> None:
    assert outside_range(text("pyproject.toml"), text("constraints.txt")) == []
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    pinned = pins(text("constraints.txt"))
    for one in map(Requirement, (line for extra in PINNED for line in extras[extra])):
        assert pinned[canonicalize_name(one.name)] in one.specifier, one


@pytest.mark.parametrize("name", FIXED)
def test_torch_is_the_same_everywhere(name: str) -> None:
    files = ("constraints.txt", "constraints-lowest.txt", "constraints-newest.txt")
    assert len({pins(text(file))[name] for file in files}) == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("grpcio>=1.84", "grpcio>=1.85"), ["grpcio"]),
        (('"numpy>=1.26"', '"numpy>=1.26", "newcomer>=1"'), ["newcomer"]),
    ],
)
def test_bound_that_is_not_tested_is_found(change: tuple[str, str], found: list[str]) -> None:
    project = text("pyproject.toml").replace(*change)
    assert wrong_lowest(project, text("constraints-lowest.txt")) == found


def test_pin_outside_its_range_is_found() -> None:
    constraints = re.sub(r"^protobuf==.*$", "protobuf==8.1", text("constraints.txt"), flags=re.MULTILINE)
    assert outside_range(text("pyproject.toml"), constraints) == ["protobuf"]


def places(text: str) -> list[str]:
    """What names where packages come from: that is each machine's own setting."""
    return re.findall(r"\w+://\S+|^\s*-\S+|\b\w+\.(?:org|com|io)\b", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt", "constraints-newest.txt"])
def test_no_file_of_versions_names_where_packages_come_from(name: str) -> None:
    assert places(text(name)) == []


@pytest.mark.parametrize("line", ["--index-url x", "numpy @ https://host/numpy.whl", "# from pypi.example.org"])
def test_place_that_packages_come_from_is_found(line: str) -> None:
    assert places(f"numpy==2.4.6\n{line}\n")
