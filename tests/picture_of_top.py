"""The pages' picture of `ormo-server top`: run as a program it trains for some seconds and draws what top shows."""

import re
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from ormo_server.console.client import asker
from ormo_server.console.figures import History
from ormo_server.console.top import View
from system.programs import Stage, staged

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "top.svg"
_SHOWN_ADDRESS = "127.0.0.1:50051"  # the real port is chance
_WIDTH = 118
_SLOWER = {"worker-1": 4, "worker-2": 4, "worker-3": 25, "worker-4": 60}
_GRADIENTS = 8000
_SHARE_DONE = 0.25


def trained_for_a_while(stage: Stage) -> History:
    """What a run with unequal workers tells in its last second, when a good part of it is done."""
    stage.server(stop_after_gradients=_GRADIENTS, checkpoint_seconds=5)
    for worker, factor in _SLOWER.items():
        stage.worker(worker, slow_factor=factor)
    flags = ("--server", stage.address, "--every-seconds", 2)
    stage.program("evaluator", "evaluate", *flags, module="ormo_worker")
    stage.until(lambda status: status.iteration.number > _SHARE_DONE * _GRADIENTS, "training", 120)
    history = History()
    with asker(stage.address, 5) as server:
        for _ in range(3):
            history.add(server.ask())
            time.sleep(1)
    return history


def drawn(history: History) -> str:
    """The view as a picture that needs nothing from elsewhere, so no fonts either."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=_WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(View(_SHOWN_ADDRESS, history, "delay"))
    picture = console.export_svg(title="ormo-server top", theme=MONOKAI, unique_id="top")
    picture = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", picture, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in picture.splitlines() if line.strip()) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        picture = drawn(trained_for_a_while(stage))
    PICTURE.write_text(picture)
    sys.stdout.write(f"{PICTURE}: {len(picture.encode())} bytes\n")


if __name__ == "__main__":
    main()
