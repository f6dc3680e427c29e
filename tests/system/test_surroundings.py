"""Real programs where the locale is not UTF-8, a folder's name is no text, and metrics are to be shared."""

import os
from pathlib import Path

from system.programs import Program, Stage

# Python would take UTF-8 in place of a plain C locale; with others, which need not be installed here, it does not.
STRANGE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PROMETHEUS_MULTIPROC_DIR": "/not/there"}
FOLDER = os.fsdecode(b"l\xc3\xa4ufe-\xff")


def test_a_run_goes_on_and_is_shown_in_strange_surroundings(stage: Stage) -> None:
    def program(name: str, *arguments: str, module: str = "ormo_server") -> Program:
        return stage.program(name, *arguments, module=module, environment=STRANGE)

    server = program(
        "server", "serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--directory", FOLDER
    )
    assert server.process.stdout is not None
    address = server.process.stdout.readline().split()[1].partition("=")[2]
    worker = ("--server", address, "--leave-after-gradients", "3")
    assert program("worker", "run", *worker, module="ormo_worker").wait() == 0
    code, said = program("control", "control", "--server", address, "--checkpoint").printed()
    assert code == 0
    assert said.startswith("checkpoint l")
    code, said = program("status", "status", "--server", address).printed()
    assert code == 0
    assert "iteration 3, 96 samples" in said
    assert "udcff/checkpoint-" in said
    assert server.terminate() == 0
    assert "Traceback" not in server.log.read_text()
    assert any((Path(stage.folder) / FOLDER).glob("checkpoint-*/model.safetensors"))


KEEPS = """
from ormo_worker.tasks.digits import Digits

class Kept:
    def __del__(self):
        print("taken apart")

KEPT = Kept()
"""


def test_a_worker_that_is_told_to_leave_does_not_take_its_objects_apart_first(stage: Stage) -> None:
    """On a busy machine that took longer than all that came before."""
    (stage.folder / "keeps.py").write_text(KEEPS)
    stage.server()
    worker = stage.worker("w", {"TZ": "UTC"}, task="keeps.py:Digits")  # in a process of its own, with the end of one
    stage.until(lambda s: any(w.applied for w in s.workers), "it trains")
    assert worker.terminate() == 0
    assert worker.printed() == (0, "")
    assert "interrupted: left the run" in worker.log.read_text()
    assert " WARNING " not in worker.log.read_text()
