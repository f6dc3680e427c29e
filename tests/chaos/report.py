"""What a run prints besides its violations."""

import argparse
import bisect
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

from chaos.evidence import Evidence
from chaos.faults import KILLS
from chaos.memory import Life, server_ends, unmeasured


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def report(options: argparse.Namespace, evidence: Evidence, done: list[tuple[str, bool]], folder: Path) -> None:
    """Say what happened."""
    load = f"{options.workers} workers, {options.elements} elements"
    say(f"method {options.method}, {load}, journal {_journal(options)}")
    faults, idle = Counter(name for name, _ in done), Counter(name for name, effect in done if not effect)
    say("faults: " + ", ".join(f"{count} × {name}" for name, count in faults.most_common()))
    say(f"kills of the server: {sum(faults[kill] for kill in KILLS)}; lives: {len(evidence.starts)}")
    counted = len(evidence.applied) if evidence.applied is not None else evidence.end
    say(f"gradients tried {len(evidence.tried):,}, acknowledged {len(evidence.told):,}, applied {counted:,}")
    say(f"refused: {dict(Counter(evidence.refused.values()))}")
    recovered = sorted(_recoveries(folder))
    if recovered:
        say(
            f"seconds from the open port to the first gradient that was acknowledged: median "
            f"{statistics.median(recovered):.2f}, 90 % {recovered[int(0.9 * len(recovered))]:.2f}, "
            f"most {recovered[-1]:.2f} ({len(recovered)} starts)"
        )
    if idle:
        say("without effect: " + ", ".join(f"{count} × {name}" for name, count in idle.most_common()))
    _say_memory(evidence.memory)


def _say_memory(lives: list[Life]) -> None:
    memory = [size / 1e6 for size in server_ends(lives)]
    if memory:
        say(f"server's memory at its ends: {memory[0]:.0f} MB first, {memory[-1]:.0f} last, {max(memory):.0f} most")
    long = [life for life in lives if life.is_long]
    servers = sum(life.is_server for life in long)
    say(f"lives that were long enough to see memory grow: {servers} of the server, {len(long) - servers} of workers")
    for whom in unmeasured(lives):
        say(f"nothing could be measured of the memory of {whom}")


def _journal(options: argparse.Namespace) -> str:
    return f"with fsync {options.fsync}" if options.journal else "off"


def _recoveries(folder: Path) -> list[float]:
    """For each start but the first: from the open port to the next acknowledgement of any worker."""
    answers = sorted(
        line["at"]
        for path in folder.glob("*.diary")
        for line in map(json.loads, path.read_text().splitlines())
        if "acked" in line
    )
    opened = json.loads((folder / "stage.json").read_text())["opened"][1:]
    places = [(moment, bisect.bisect(answers, moment)) for moment in opened]
    return [answers[place] - moment for moment, place in places if place < len(answers)]
