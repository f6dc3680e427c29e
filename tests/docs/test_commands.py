"""Commands that the pages, the runbook and the Makefile show are understood by the programs that they name."""

import re
import shlex
from pathlib import Path

import pytest

from docs.pages import PAGES, ROOT, all_text, blocks
from ormo_runtime.settings_loader import read_settings
from ormo_server.console.settings import ControlSettings, StatusSettings, TopSettings
from ormo_server.export import ExportSettings
from ormo_server.settings import ServerSettings
from ormo_server.sim.reproduce.command import ReproduceSettings
from ormo_server.sim.settings import SimSettings
from ormo_worker.integrations.ray.settings import RaySettings, ScaleSettings
from ormo_worker.local.cluster import LocalSettings
from ormo_worker.settings import EvaluateSettings, RunSettings

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SETTINGS = {
    "ormo-server serve": ServerSettings,
    "ormo-server status": StatusSettings,
    "ormo-server top": TopSettings,
    "ormo-server control": ControlSettings,
    "ormo-server export": ExportSettings,
    "ormo-worker run": RunSettings,
    "ormo-worker evaluate": EvaluateSettings,
    "ormo-local": LocalSettings,
    "ormo-ray scale": ScaleSettings,
    "ormo-ray": RaySettings,
    "ormo-sim reproduce": ReproduceSettings,
    "ormo-sim": SimSettings,
}
# Each is run, or parsed by the real tool, in the test that is named.
ELSEWHERE = {
    "docker": "tests/deploy/test_documented_commands.py",
    "kubectl": "tests/deploy/test_documented_commands.py",
    "ray": "tests/integrations/test_ray.py",
    "sbatch": "tests/integrations/test_slurm.py",
    "pip": "tests/integrations",
    "rm": "tests/integrations/test_buckets.py",
}


def words_of_make(text: str) -> set[str]:
    typed = "\n".join([*blocks(text, "sh"), *re.findall(r"`(make [^`]+)`", text)])
    found = re.findall(r"^make ([a-z][a-z-]*(?: [a-z][a-z-]*)*)", typed, re.MULTILINE)
    return {word for words in found for word in words.split()}


def unknown_words(text: str) -> list[str]:
    targets = {word for line in re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.MULTILINE) for word in line.split()}
    return sorted(words_of_make(text) - targets)


def test_make_words_exist() -> None:
    assert len(words_of_make(all_text())) > 10
    assert unknown_words(all_text()) == []
    assert unknown_words("`make nothing` and\n```sh\nmake train none  # it\n```") == ["none", "nothing"]


# In running text a flag may stand without its value.
NAMED_ONLY = {"ormo-ray scale", "ormo-sim --trace", "ormo-server control", "ormo-sim reproduce"}
GIVEN = {"HOST:PORT": "h:1", "X": "1"}


def test_commands_in_the_pages_and_the_makefile_are_understood_by_the_programs() -> None:
    text = all_text() + MAKEFILE
    names = "|".join(sorted(SETTINGS, key=len, reverse=True))
    commands = re.findall(rf"(?:^|`|BIN\)/)((?:{names})(?: --[^`$\n]+)?)(?: *#.*)?(?=`|$)", text, re.MULTILINE)
    shown = set()
    for command in commands:
        program = next(name for name in SETTINGS if f"{command} ".startswith(f"{name} "))
        words = shlex.split(command.removeprefix(program), comments=True)
        if " ".join((program, *words)) in NAMED_ONLY:
            continue
        given = [GIVEN.get(word, word) for word in words]
        read_settings(SETTINGS[program], given, {}, program=program)
        shown.add(program)
    assert shown == set(SETTINGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_line_that_one_may_type_is_one_that_some_test_knows(page: Path) -> None:
    lines = [line for block in blocks(page.read_text(encoding="utf-8"), "sh") for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        known = (
            not words
            or (words[0] == "make" and not unknown_words(f"`{' '.join(words)}`"))
            or any(line.startswith(name) for name in SETTINGS)
            or words[0] in ELSEWHERE
            or line in RUN_BY_HAND
        )
        assert known, f"{line!r}: run it in tests/docs, or have its tool parse it"


# Of CONTRIBUTING: what `make` runs by itself, on a part of the tree. The paths are checked below.
RUN_BY_HAND = {
    ".venv/bin/python -m pytest tests/core -n 2 --dist worksteal -q",
    ".venv/bin/python -m pytest tests/service -k lifecycle -q",
}


def test_paths_to_tests_in_the_pages_exist() -> None:
    paths = set(re.findall(r"\btests/[\w/]+(?:\.py)?", all_text()))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
