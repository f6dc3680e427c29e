"""What a local run leaves in its directory for people: a table of evaluations, delays, a summary, and pictures of them.

The pictures are `ormo-sim plot`'s, in a process of its own: it needs the extra `sim`, and is the server's.
"""

import contextlib
import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import printable
from ormo_runtime.tracking import Figures, Position, Setting

EVALUATIONS, DELAYS, SUMMARY = "evaluations.csv", "delays.csv", "summary.json"
_EARLIER = "evaluations-earlier.csv"
COLUMNS = (
    "seconds",
    "gradients",
    "samples",
    "batch_loss",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "delay_mean",
    "delay_max",
    "lag_mean",
    "samples_per_second",
    "discarded",
    "newest_bucket",
    "bucket_size",
    "workers",
)
_PLOT = "import sys; from ormo_server.sim.cli import main; sys.exit(main(['plot', '--runs', *sys.argv[1:]]))"


class Evaluations:
    """The table, a row per evaluation, each with the figures that came before it. A full disk ends nothing.

    Args:
        directory: of the run.
        continues: the run goes on with the table; else one that is there is kept under another name.
        tell: what sentences go to.
    """

    def __init__(self, directory: Path, *, continues: bool, tell: Callable[[str], object]) -> None:
        self._path = directory / EVALUATIONS
        self._offset = _last_seconds(self._path) if continues else None
        self._tell = tell
        self._full = False
        self._before: Figures = {}
        with self._told():
            if self._offset is None:
                if self._path.exists():
                    self._path.replace(directory / _EARLIER)
                self._write(COLUMNS)

    def track(self, figures: Figures, position: Position) -> None:
        """Append an evaluation; it is in the file at once, and empty where nothing is known."""
        if "test_loss" not in figures:
            self._before = figures
            return
        seconds = (self._offset or 0.0) + position["seconds"]
        known = {"gradients": position["updates"], "samples": position["samples"], "seconds": seconds}
        row = {**self._before, **figures, **known}
        with self._told():
            self._write([row.get(name, "") for name in COLUMNS])

    def close(self) -> None:
        """There is nothing left."""

    def _write(self, row: Sequence[object]) -> None:
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(row)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._full:
                self._full = True
                self._tell(f"the table of evaluations lacks rows from here on, the run goes on: {error}")


def _last_seconds(path: Path) -> float | None:
    """When the run's last evaluation was; None if there is no table of ours, or it is empty."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return float(rows[-1]["seconds"]) if rows and tuple(rows[-1]) == COLUMNS else None
    except (OSError, ValueError):
        return None


def write_summary(
    directory: Path, settings: Mapping[str, Setting], status: pb.GetStatusResponse, delays: Mapping[int, int]
) -> None:
    """Write what is known at the end.

    Args:
        directory: of the run.
        settings: that it was started with.
        status: the last one.
        delays: how many gradients were counted with each delay; empty if that is not known.

    Raises:
        OSError: it can't be written.
    """
    with (directory / DELAYS).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("delay", "gradients"))
        table.writerows(sorted(delays.items()))
    found = {
        "measured": True,  # not simulated
        "settings": dict(settings),
        "method": status.method,
        "gradients": status.iteration.number,
        "samples": status.samples,
        "discarded": status.discarded,
        "refused": sum(status.refusals.values()),
        "batch_loss": status.loss if status.HasField("loss") and math.isfinite(status.loss) else None,
        "delay": {"mean": status.delay_mean, "max": status.delay_max},
    }
    aside = directory / (SUMMARY + ".part")
    aside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    aside.replace(directory / SUMMARY)


def draw(directory: Path) -> str:
    """Have the pictures drawn; returns where they are, or in a sentence why there are none."""
    for package, extra in (("matplotlib", "sim"), ("ormo_server", "server,sim")):
        if find_spec(package) is None:
            return f"none: {package} is missing, pip install 'ormo-parameter-server[{extra}]'"
    command = [sys.executable, "-c", _PLOT, str(directory), "--directory", str(directory)]
    drawn = subprocess.run(  # noqa: S603
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if drawn.returncode:
        said = drawn.stderr.strip().splitlines()
        return f"none: {printable(said[-1]) if said else f'drawing ended with code {drawn.returncode}'}"
    return ", ".join(drawn.stdout.split("\n")).strip(", ")
