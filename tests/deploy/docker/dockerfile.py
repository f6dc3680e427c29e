"""Dockerfiles taken apart, and what one of their stages builds, built without containers.

Only what these Dockerfiles use is understood; anything else fails, so that no step goes unnoticed.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.docker.tree import FOLDER, ROOT

VENV = "/opt/ormo"  # where the images have the programs
PROGRAMS = "/opt/programs"  # where they are alone, to be a layer of their own


@dataclass(frozen=True)
class Instruction:
    keyword: str
    value: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.value)

    @property
    def exec_form(self) -> list[str]:
        """The program and its arguments; a shell form, which SIGTERM does not get through, is an error."""
        command: list[str] = json.loads(self.value[self.value.index("[") :])
        return command


@dataclass
class Stage:
    """One FROM and what follows, with what it has from the stage it is built on before it."""

    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, keyword: str) -> list[Instruction]:
        return [one for one in self.instructions if one.keyword == keyword]

    def last(self, keyword: str) -> Instruction:
        return self.all(keyword)[-1]

    @property
    def environment(self) -> dict[str, str]:
        pairs = [word.partition("=") for one in self.all("ENV") for word in one.words]
        return {name: value for name, _, value in pairs}


class Dockerfile:
    def __init__(self, name: str) -> None:
        self.arguments: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        text = (FOLDER / name).read_text()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        stage: Stage | None = None
        for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
            keyword, _, value = line.partition(" ")
            if keyword == "FROM":
                base, _, alias = value.partition(" AS ")
                inherited = self.stages[base].instructions if base in self.stages else []
                stage = self.stages[alias] = Stage(base, list(inherited))
            elif stage is not None and keyword:
                stage.instructions.append(Instruction(keyword, value.strip()))
            elif keyword:
                argument, _, default = value.partition("=")
                self.arguments[argument] = default


def build(stage: Stage, sources: Path, venv: Path, programs: Path) -> None:
    """Do what a build stage does: its COPYs from the build context into `sources`, its RUNs there.

    Secrets are not mounted, as for whoever has none: pip takes the configuration of this machine.
    """
    places = {VENV: str(venv), PROGRAMS: str(programs)}
    defaults: dict[str, str] = {}
    for one in stage.instructions:
        if one.keyword == "COPY":
            *froms, to = one.words
            _copy(froms, sources, to)
        elif one.keyword == "RUN":
            words = shlex.split(string.Template(one.value).substitute(defaults))
            mounts = ("--mount=type=cache,", "--mount=type=secret,")
            _run([places.get(word, word) for word in words if not word.startswith(mounts)], sources)
        elif one.keyword == "ARG":
            name, _, default = one.words[0].partition("=")
            defaults[name] = default
        else:
            assert one.keyword == "WORKDIR", one


def _copy(froms: Sequence[str], sources: Path, to: str) -> None:
    for name in froms:
        assert in_context(name), f"{name} is not in the build context: .dockerignore leaves it out"
        target = sources / to / Path(name).name if to.endswith("/") else sources / to
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=lambda _, names: {one for one in names if one == "__pycache__"})
        else:
            shutil.copy(ROOT / name, target)


def _run(words: Sequence[str], folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORMO_")}
    ran = subprocess.run(
        words,
        cwd=folder,
        env=environment | {"PYTHON": sys.executable, "TORCH_INDEX_URL": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{shlex.join(words)}:\n{ran.stdout}"


def in_context(name: str) -> bool:
    """Whether .dockerignore lets a path through: the last line that matches it, or a folder above it, decides."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    above = [str(path) for path in (Path(name), *Path(name).parents)][:-1]
    let_through = True
    for line in lines:
        pattern = line.removeprefix("!").removeprefix("**/")
        candidates = [Path(path).name for path in above] if "**/" in line else above
        # `*` stops at a slash, as it does there.
        if any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for path in candidates):
            let_through = line.startswith("!")
    return let_through
