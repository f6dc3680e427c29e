"""The command line: `make chaos`."""

import argparse
import bisect
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos.checker import violations
from chaos.evidence import Evidence, merged, read_diaries, read_lives
from chaos.faults import CLOCK_LIBRARY, FAULTS, KILLS, LASTING, SUDDEN, clock_environment
from chaos.network import enter_own
from chaos.stage import Load, Stage

_LEASE_SECONDS = 2.0
_MARGIN_SECONDS = 10.0  # of two shared cores
_OVERLAPPING = 0.25  # share of the faults in the midst of which there is another


def main() -> None:
    """Run, check, and say what was found."""
    options = _options()
    options.lossy = enter_own([sys.executable, "-m", "chaos", *sys.argv[1:]])
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    _say(f"seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="ormo-chaos-", dir=options.into))
    faults = Counter(_acted(options, random.Random(seed), folder))
    evidence = _evidence(folder, journal=options.journal)
    found = violations(
        evidence,
        workers=options.workers,
        bound_seconds=_LEASE_SECONDS + _MARGIN_SECONDS,
        plain_sgd=options.method == "asgd",
    )
    _report(options, evidence, faults, folder)
    for violation in found[:20]:
        _say(f"VIOLATION: {violation}")
    _say(f"{len(found)} violations; the evidence is in {folder}" if found else "0 violations")
    raise SystemExit(1 if found else 0)


def _acted(options: argparse.Namespace, dice: random.Random, folder: Path) -> list[str]:
    done: list[str] = []
    flags = ["--method", options.method, "--learning-rate", "1", "--failure-timeout", str(_LEASE_SECONDS)]
    flags += ["--checkpoint-seconds", str(options.checkpoint_seconds), "--max-workers", str(2 * options.workers)]
    if options.journal:
        flags += ["--journal", "--journal-fsync", options.fsync]
    load = Load(options.workers, options.elements, options.pause, _LEASE_SECONDS)
    stage = Stage(folder, flags, load, clock_environment(folder))
    names = _possible(options)
    try:
        stage.start_server()
        for column in range(options.workers):
            stage.start_worker(column)
        stage.until_answered(10, "at the start")
        deadline = time.monotonic() + options.seconds
        while time.monotonic() < deadline and sum(done.count(kill) for kill in KILLS) < options.kills:
            time.sleep(dice.uniform(0.05, 1.0))
            now = _chosen(names, dice)
            _happen(now, stage, dice)
            done += now
            stage.until_answered(10, f"after {' during '.join(now)}")
        _finish(stage)
    finally:
        stage.close()
        (folder / "stage.json").write_text(
            json.dumps({"trouble": stage.trouble, "opened": stage.opened, "memory": stage.memory})
        )
    return done


def _possible(options: argparse.Namespace) -> list[str]:
    missing = {} if CLOCK_LIBRARY is not None else {"jump of the wall clock": "libfaketime is not installed"}
    if not options.lossy:
        missing["packet loss"] = "no network namespace with nft is permitted here"
    wanted = options.faults or list(FAULTS)
    for name in wanted:
        if name in missing:
            _say(f"left out: {name} ({missing[name]})")
    return [name for name in wanted if name not in missing]


def _chosen(names: list[str], dice: random.Random) -> list[str]:
    """One fault, or a sudden one in the midst of one that lasts."""
    lasting, sudden = [name for name in names if name in LASTING], [name for name in names if name in SUDDEN]
    if lasting and sudden and dice.random() < _OVERLAPPING:
        return [dice.choice(sudden), dice.choice(lasting)]
    return [dice.choice(names)]


def _happen(names: list[str], stage: Stage, dice: random.Random) -> None:
    first, *meanwhile = names
    with ThreadPoolExecutor(1) as pool:
        running = [
            pool.submit(FAULTS[name], stage, random.Random(dice.randrange(1 << 32)), _LEASE_SECONDS)
            for name in meanwhile
        ]
        if meanwhile:
            time.sleep(dice.uniform(0.0, 0.5))
        FAULTS[first](stage, dice, _LEASE_SECONDS)
        for each in running:
            each.result()


def _finish(stage: Stage) -> None:
    for worker in stage.workers.values():
        worker.send_signal(signal.SIGTERM)
    for worker in stage.workers.values():
        worker.wait(60)
    assert stage.end_server(signal.SIGTERM) == 0


def _evidence(folder: Path, *, journal: bool) -> Evidence:
    noted = json.loads((folder / "stage.json").read_text())
    evidence = Evidence(memory=noted["memory"])
    read_diaries(evidence, folder, merged([(begin, end) for begin, end in noted["trouble"]]))
    read_lives(evidence, folder / "archive", journal=journal)
    return evidence


def _report(options: argparse.Namespace, evidence: Evidence, faults: Counter[str], folder: Path) -> None:
    load = f"{options.workers} workers, {options.elements} elements"
    _say(f"method {options.method}, {load}, journal {_journal(options)}")
    _say("faults: " + ", ".join(f"{count} × {name}" for name, count in faults.most_common()))
    _say(f"kills of the server: {sum(faults[kill] for kill in KILLS)}; lives: {len(evidence.starts)}")
    counted = len(evidence.applied) if evidence.applied is not None else evidence.end
    _say(f"gradients tried {len(evidence.tried):,}, acknowledged {len(evidence.told):,}, applied {counted:,}")
    _say(f"refused: {dict(Counter(evidence.refused.values()))}")
    recovered = sorted(_recoveries(folder))
    if recovered:
        _say(
            f"seconds from the open port to the first gradient that was acknowledged: median "
            f"{statistics.median(recovered):.2f}, 90 % {recovered[int(0.9 * len(recovered))]:.2f}, "
            f"most {recovered[-1]:.2f} ({len(recovered)} starts)"
        )
    memory = [size / 1e6 for size in evidence.memory]
    if memory:
        _say(f"server's memory at its ends: {memory[0]:.0f} MB first, {memory[-1]:.0f} last, {max(memory):.0f} most")


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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="of the faults; by default a new one, which is printed")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long at most")
    parser.add_argument("--kills", type=int, default=200, help="stop after so many kills of the server")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, help="by default all")
    parser.add_argument("--method", default="asgd", help="with asgd the parameters themselves count the gradients")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--elements", type=int, default=1000, help="of the model")
    parser.add_argument("--pause", type=float, default=0.005, help="seconds of a worker between gradients")
    parser.add_argument("--checkpoint-seconds", type=float, default=0.7)
    parser.add_argument("--fsync", choices=["always", "interval", "off"], default="always")
    parser.add_argument("--no-journal", dest="journal", action="store_false")
    parser.add_argument("--into", type=Path, help="folder for the evidence; by default the system's for such")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
