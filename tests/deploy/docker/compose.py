"""The compose file as Compose reads it, less what only matters to a container engine."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from deploy.docker.dockerfile import Dockerfile, Stage
from deploy.docker.tree import FOLDER, ROOT

PATH = FOLDER / "compose.yaml"
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def variables() -> dict[str, str]:
    """The variables that the file takes from its environment, with their defaults."""
    text = "\n".join(line for line in PATH.read_text().splitlines() if not line.lstrip().startswith("#"))
    found = _VARIABLE.findall(text)
    assert len(found) == text.count("$"), "each variable has a default"
    defaults = dict(found)
    assert set(found) == set(defaults.items()), "and the same one everywhere"
    return defaults


def services(given: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The services, with variables replaced as Compose does: an empty one is as good as none."""
    given = {name: value for name, value in (given or {}).items() if value}
    text = _VARIABLE.sub(lambda match: given.get(match[1]) or match[2], PATH.read_text())
    loaded: dict[str, Any] = yaml.safe_load(text)["services"]
    return loaded


def image(service: Mapping[str, Any]) -> Stage | None:
    """The stage of our own that a service's image is made of; None for an image of others."""
    if "build" not in service:
        return None
    recipe = service["build"]
    assert (FOLDER / recipe["context"]).resolve() == ROOT
    stages = Dockerfile(recipe["dockerfile"].removeprefix("deploy/docker/")).stages
    return stages[recipe.get("target", list(stages)[-1])]


def seconds(duration: str) -> float:
    """A duration such as 90s or 1m30s."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", duration)
    assert "".join(number + unit for number, unit in parts) == duration
    return sum(float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)
