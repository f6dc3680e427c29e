"""The README is true: its tables are generated, and its examples run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from ormo_runtime.settings import read_settings
from ormo_server.config import ServerSettings
from ormo_server.sim.config import SimSettings
from ormo_server.sim.reproduce.config import ReproduceSettings
from ormo_worker.local.settings import LocalSettings
from ormo_worker.settings import EvaluateSettings, RunSettings
from readme import README, example, with_tables
from system.programs import ENVIRONMENT, Stage

ROOT = Path(__file__).parents[2]


def test_settings_tables_are_those_of_the_settings_classes() -> None:
    text = README.read_text()
    assert text.count("settings: ormo_") == 7
    assert text.count("<!-- metrics: ") == 3
    assert with_tables(text) == text, "run `make readme`"


def test_make_words_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    words = set(re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE))
    assert words
    assert [word for word in words if not re.search(rf"^{word}:", makefile, re.MULTILINE)] == []


SETTINGS = {
    "ormo-server serve": ServerSettings,
    "ormo-worker run": RunSettings,
    "ormo-worker evaluate": EvaluateSettings,
    "ormo-local": LocalSettings,
    "ormo-sim reproduce": ReproduceSettings,
    "ormo-sim": SimSettings,
}


def test_commands_in_the_readme_and_the_makefile_are_understood_by_the_programs() -> None:
    text = README.read_text() + (ROOT / "Makefile").read_text()
    programs = "server serve|worker \\w+|local|sim|sim reproduce"
    commands = re.findall(rf"(?:^|`|BIN\)/)(ormo-(?:{programs}) --[^`$\n]+)(?=`|$)", text, re.MULTILINE)
    shown = set()
    for command in commands:
        program = next(name for name in SETTINGS if command.startswith(f"{name} "))
        read_settings(SETTINGS[program], shlex.split(command.removeprefix(program)), {}, program=program)
        shown.add(program)
    assert shown == set(SETTINGS)


def ran(stage: Stage, code: str) -> str:
    """What a program with this code prints."""
    (stage.folder / "loop.py").write_text(code)
    command = [sys.executable, "loop.py"]
    where = {"cwd": stage.folder, "env": ENVIRONMENT}
    done = subprocess.run(command, **where, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adoption_example_trains_as_it_stands(stage: Stage) -> None:
    stage.server(stop_after_gradients=200, learning_rate=0.02)
    code = example("adoption").replace("127.0.0.1:50051", stage.address) + "\nprint(float(loss))\n"
    assert code.count("# <-") == 5
    printed = ran(stage, code)
    assert stage.status().iteration.number == 200
    assert float(printed) < 0.5  # it begins at about 4, the variance of the targets


def test_frozen_example_takes_the_models_place_and_trains(stage: Stage) -> None:
    stage.server(stop_after_gradients=200, learning_rate=0.02)
    code, count = re.subn(r"^model = .*\n", example("frozen"), example("adoption"), flags=re.MULTILINE)
    assert count == 1
    told = "\nprint(float(loss), optimizer._outgoing[0].payload.layout.parameters * 4)\n"
    loss, moved = ran(stage, code.replace("127.0.0.1:50051", stage.address) + told).split()
    assert float(loss) < 2.0
    whole = (4 * 16 + 16 + 16 + 1) * 4
    assert f"a step moves {moved} bytes each way instead of {whole}:" in README.read_text()


def test_task_example_trains_as_it_stands(stage: Stage) -> None:
    (stage.folder / "rings.py").write_text(example("task"))
    command = re.search(r"^ormo-local (--task rings.*)$", README.read_text(), re.MULTILINE)
    assert command is not None
    local = stage.program("local", *command[1].split(), module="ormo_worker.local")
    code, output = local.printed()
    assert code == 0, output
    assert float(output.split("test accuracy")[1].split("%")[0]) > 85
