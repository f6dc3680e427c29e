"""The command `ormo-sim`."""

import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ormo_runtime import logs
from ormo_runtime.process import prepare_process
from ormo_runtime.settings import UsageError
from ormo_runtime.settings_loader import BAD_SETTINGS_EXIT_CODE, load_settings
from ormo_server.sim.plan import Plan, Result
from ormo_server.sim.record import Directory, Row
from ormo_server.sim.settings import SimSettings
from ormo_server.sim.tracked import tracked

_INTERRUPTED_EXIT_CODE = 130
# An update of the bar takes as long as a push of a small model.
_GRADIENTS_BETWEEN_UPDATES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; without a command's name, simulate. Returns the exit code."""
    prepare_process()
    if find_spec("matplotlib") is None:  # now, and not when hours have been computed that are to be drawn
        logs.last_words("ormo-sim", "matplotlib is not installed: pip install 'ormo-parameter-server[sim]'", "text")
        return BAD_SETTINGS_EXIT_CODE
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except (UsageError, OSError) as error:
        logs.last_words("ormo-sim", error, "text")
        return BAD_SETTINGS_EXIT_CODE
    except KeyboardInterrupt:
        return _INTERRUPTED_EXIT_CODE


def _run(arguments: list[str]) -> int:
    match arguments[:1]:
        case ["plot"]:
            from ormo_server.sim.plots import plot

            return plot(arguments[1:])
        case ["reproduce"]:
            from ormo_server.sim.reproduce.command import reproduce

            return reproduce(arguments[1:])
        case _:
            return simulate(arguments)


def simulate(argv: Sequence[str]) -> int:
    """Simulate one run and show what came of it."""
    settings = load_settings(SimSettings, argv, program="ormo-sim")
    console = Console()
    plan = Plan(settings)
    if plan.warning():
        console.print(plan.warning(), style="yellow", soft_wrap=True)
    with tracked(plan.settings, lambda said: console.print(said, style="yellow", markup=False)) as track:
        directory = Directory(settings.directory or Path(time.strftime("runs/sim-%Y%m%d-%H%M%S")))
        started = time.perf_counter()
        try:
            result = _with_progress(plan, directory, console, track)
        finally:
            directory.close()
        wall_seconds = time.perf_counter() - started
        described = {"settings": plan.settings.recorded(), **result.summary}
        directory.complete(result.record, described | _cost(result, wall_seconds))
        if settings.plots:
            from ormo_server.sim.plots import draw

            draw([directory.path], directory.path)
        _show(console, directory.path, result, wall_seconds, "pushes" if settings.local_steps else "gradients")
    return 0


def _with_progress(plan: Plan, directory: Directory, console: Console, track: Callable[[Row], None]) -> Result:
    columns = (
        TextColumn("{task.fields[method]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=plan.gradients, method=plan.settings.run().method.name, last="")

        def show(row: Row) -> None:
            directory.write_row(row)
            track(row)
            last = f"{row.seconds:.0f} virtual s, loss {row.train_loss:.4f}, accuracy {row.test_accuracy:.1%}"
            progress.update(task, last=last)

        def advance(iteration: int) -> None:
            if iteration % _GRADIENTS_BETWEEN_UPDATES == 0:
                progress.update(task, completed=iteration)

        return plan.run(show, advance)


def _cost(result: Result, wall_seconds: float) -> dict[str, float]:
    """What it took in real time: figures of this machine, no part of the result."""
    pushes = result.record.delays.total() + result.record.discarded + result.record.refusals
    overhead = wall_seconds - result.record.compute_seconds
    return {"wall_seconds": wall_seconds, "overhead_seconds_per_push": overhead / max(1, pushes)}


def _show(console: Console, directory: Path, result: Result, wall_seconds: float, pushed: str) -> None:
    found = result.summary
    delay, last = found["delay"], result.record.rows[-1]
    reached = {target: seconds for target, seconds in found["seconds_to_accuracy"].items() if seconds is not None}
    rows = {
        pushed: f"{found['gradients']} ({found['epochs']:.1f} epochs), {found['discarded']} discarded",
        "virtual time": f"{found['virtual_seconds']:.1f} s, {found['updates_per_virtual_second'] or 0:.2f} {pushed}/s",
        "real time": f"{wall_seconds:.1f} s",
        "delay": "none" if delay["mean"] is None else f"mean {delay['mean']:.1f}, largest {delay['max']}",
        "train loss": "not finite: diverged" if found["train_loss"] is None else f"{found['train_loss']:.4f}",
        "test loss": "not finite" if found["test_loss"] is None else f"{found['test_loss']:.4f}",
        "test accuracy": f"{found['test_accuracy']:.2%} (best {found['best_test_accuracy']:.2%})",
        "moved": f"{last.bytes_moved / 1e6:,.1f} MB both ways, {last.int8_bytes_moved / 1e6:,.1f} MB had it been int8",
        "accuracy reached": ", ".join(f"{float(t):.0%} at {s:.0f} s" for t, s in reached.items())
        or "none of the targets",
        "digest": found["digest"][:16],
        "results": str(directory),
    }
    for name, value in rows.items():
        console.print(f"{name:>16}  {value}", highlight=False, markup=False, soft_wrap=True)
