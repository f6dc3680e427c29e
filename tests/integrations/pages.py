"""The pages of docs/with/, and their programs, run as they stand."""

import os
import subprocess
import sys
from collections.abc import Mapping

from docs.pages import blocks, text_of
from system.programs import ENVIRONMENT, Stage

# No library asks the network for anything, or says that it would like to.
OFFLINE = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": os.environ["PATH"]}
# `python PROGRAM`, once torchvision is imported: that of the package index beside a CPU build of torch has to be first.
STARTED = """\
import runpy, sys
from ormo_worker.tasks.images import import_torchvision
import_torchvision()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def program(page: str) -> str:
    """All Python of a page of docs/with/, one block after the other: a page is one program."""
    return "\n".join(blocks(text_of(f"with/{page}.md"), "python"))


def ran(stage: Stage, code: str, *, environment: Mapping[str, str] = OFFLINE, seconds: float = 240.0) -> str:
    """What a program with this code prints, that has the stage's server as the pages' 127.0.0.1:50051."""
    script = stage.folder / "program.py"
    script.write_text(code.replace("127.0.0.1:50051", stage.address), encoding="utf-8")
    command = [sys.executable, "-c", STARTED, script.name]
    done = subprocess.run(
        command, cwd=stage.folder, env=dict(environment), capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
