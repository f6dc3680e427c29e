"""The command line: `make chaos`."""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos.checker import violations
from chaos.closed_form import RULES, deviations
from chaos.diaries import read_diaries
from chaos.disk import Disk
from chaos.evidence import Evidence
from chaos.faults import CLOCK_LIBRARY, FAULTS, KILLS, LASTING, SUDDEN
from chaos.lives import read_lives
from chaos.network import enter_own, prepare
from chaos.report import report, say
from chaos.stage import Broken, Load, Stage
from ormo_server.core.method import PRESETS

_LEASE_SECONDS = 2.0
_MARGIN_SECONDS = 10.0  # of two shared cores
_ENDING_SECONDS = 30.0  # at most, with one more fault before
_ALL_MEASURED_SECONDS = 60.0  # a shorter run may have no process that lives for long enough
_WINDOWS_BYTES = 1 << 18  # 131 kB were under way to a reader who does not read
_OVERLAPPING = 0.25  # share of the faults in the midst of which there is another


def main() -> None:
    """Run each method in its share of the time, check, and say what was found."""
    options = parsed(sys.argv[1:])
    own = enter_own([sys.executable, "-m", "chaos", *sys.argv[1:]])
    lossy = own and prepare()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    say(f"seed {seed}")
    dice = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="ormo-chaos-", dir=options.into))
    runs = shares(options)
    for each in runs:
        each.faults = _possible(each, lossy=lossy)
        (folder / each.method).mkdir()
    wanted = list(dict.fromkeys(name for each in runs for name in each.faults))
    unseen = dice.sample(wanted, len(wanted))
    found: list[str] = []
    for each in runs:
        found += [f"{each.method}: {violation}" for violation in _ran(each, dice, folder / each.method, own, unseen)]
    if unseen:
        say(f"never came: {', '.join(unseen)}")
    for violation in found[:20]:
        say(f"VIOLATION: {violation}")
    say(f"{len(found)} violations; the evidence is in {folder}" if found else "0 violations")
    if not found and options.into is None:
        shutil.rmtree(folder)
    raise SystemExit(1 if found else 0)


def _ran(options: argparse.Namespace, dice: random.Random, folder: Path, own: bool, unseen: list[str]) -> list[str]:
    """Run one method; returns what is wrong, and leaves the evidence in the folder if anything is, or it is wanted."""
    disk = Disk(folder, mounting=own)
    say(f"the disk is {'a real one, in memory' if disk.is_real else 'a layer: only the journal finds it full'}")
    done: list[tuple[str, bool]] = []
    try:
        found = _acted(options, dice, folder, disk, done, unseen)
    except Broken as broken:
        disk.rescue(folder / "rescued")
        raise SystemExit(f"VIOLATION: {broken}; what there is of the evidence is in {folder}") from None
    evidence = Evidence()
    try:
        found += _judged(options, evidence, folder, disk)
    except BaseException:
        disk.rescue(folder / "rescued")  # it goes with this process, and the run may have taken half an hour
        raise
    report(options, evidence, done, folder)
    if disk.is_real:
        say(f"the disk held {disk.used_bytes / 1e6:.0f} MB at the end")
    if found or options.into is not None:
        disk.rescue(folder / "rescued")
    disk.remove()
    return found


def _judged(options: argparse.Namespace, evidence: Evidence, folder: Path, disk: Disk) -> list[str]:
    read_diaries(evidence, folder)
    read_lives(evidence, disk.path / "archive", journal=options.journal)
    found = violations(
        evidence,
        workers=options.workers,
        bound_seconds=_LEASE_SECONDS + _MARGIN_SECONDS,
        plain_sgd=options.method == "asgd",
        long=options.seconds > _ALL_MEASURED_SECONDS,
    )
    return found + _closed_form(options, disk.path / "archive")


def _closed_form(options: argparse.Namespace, archive: Path) -> list[str]:
    rule = PRESETS[options.method].rule
    if not options.journal or rule not in RULES:
        say(f"left out: the closed form ({f'rule {rule} has none' if options.journal else 'no lines of a journal'})")
        return []
    return deviations(archive, options.workers)


def _acted(
    options: argparse.Namespace,
    dice: random.Random,
    folder: Path,
    disk: Disk,
    done: list[tuple[str, bool]],
    unseen: list[str],
) -> list[str]:
    """Let it all happen, take what did from `unseen` and note it in `done`; returns what was wrong at the end."""
    load = Load(options.workers, options.elements, options.pause, _LEASE_SECONDS)
    stage = Stage(folder, disk, _flags(options), load)
    names = options.faults
    try:
        stage.start_server()
        for column in range(options.workers):
            stage.start_worker(column)
        stage.until_answered(10, "at the start", each=1)
        deadline = time.monotonic() + options.seconds
        while time.monotonic() < deadline and sum(name in KILLS for name, _ in done) < options.kills:
            if not disk.lasts(_ENDING_SECONDS):
                say("the disk is used up: the run ends early")
                break
            time.sleep(dice.uniform(0.05, 1.0))
            now = _next(names, unseen, dice, first=not done)
            done += _happen(now, stage, dice)
            stage.until_answered(10, f"after {' during '.join(now)}")
        return stage.finish()
    finally:
        stage.close()


def _flags(options: argparse.Namespace) -> list[str]:
    flags = ["--method", options.method, "--learning-rate", "1", "--failure-timeout-seconds", str(_LEASE_SECONDS)]
    flags += ["--checkpoint-seconds", str(options.checkpoint_seconds), "--max-workers", str(2 * options.workers)]
    return flags + (["--journal", "--journal-fsync", options.fsync] if options.journal else [])


def _possible(options: argparse.Namespace, *, lossy: bool) -> list[str]:
    missing = {} if CLOCK_LIBRARY is not None else {"jump of the wall clock": "libfaketime is not installed"}
    if not lossy:
        missing["packet loss"] = "no network namespace with nft is permitted here"
    if 4 * options.elements <= _WINDOWS_BYTES:
        missing["slow reader"] = "the model would be sent whole: --elements 80000 is enough"
    wanted = options.faults or list(FAULTS)
    for name in wanted:
        if name in missing:
            say(f"left out: {name} ({missing[name]})")
    return [name for name in wanted if name not in missing]


def _next(names: list[str], unseen: list[str], dice: random.Random, *, first: bool) -> list[str]:
    """Each method begins with a kill of the server; each kind comes once before any twice, with whichever method."""
    kills = [name for name in names if name in KILLS] if first else []
    for name in unseen:
        if name in (kills or names):
            unseen.remove(name)
            return [name]
    return [dice.choice(kills)] if kills else _chosen(names, dice)


def _chosen(names: list[str], dice: random.Random) -> list[str]:
    """One fault, or a sudden one in the midst of one that lasts."""
    lasting, sudden = [name for name in names if name in LASTING], [name for name in names if name in SUDDEN]
    if lasting and sudden and dice.random() < _OVERLAPPING:
        return [dice.choice(sudden), dice.choice(lasting)]
    return [dice.choice(names)]


def _happen(names: list[str], stage: Stage, dice: random.Random) -> list[tuple[str, bool]]:
    """Returns whether each took effect."""
    first, *meanwhile = names
    with ThreadPoolExecutor(1) as pool:
        running = [
            pool.submit(FAULTS[name], stage, random.Random(dice.randrange(1 << 32)), _LEASE_SECONDS)
            for name in meanwhile
        ]
        if meanwhile:
            time.sleep(dice.uniform(0.0, 0.5))
        effects = [FAULTS[first](stage, dice, _LEASE_SECONDS), *(each.result() for each in running)]
    return list(zip(names, effects, strict=True))


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="of the faults; by default a new one, which is printed")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long at most, for all methods together")
    parser.add_argument("--kills", type=int, default=200, help="stop after so many kills of the server")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, help="by default all")
    parser.add_argument(
        "--method",
        nargs="+",
        type=_method,
        default=[_method("asgd")],
        metavar="METHOD[:ELEMENTS]",
        help="one after the other, with a model of that size; with asgd the parameters themselves count the gradients",
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument(
        "--elements", type=int, default=80_000, help="of the model; above 524,288 a gradient has several chunks"
    )
    parser.add_argument("--pause", type=float, default=0.005, help="seconds of a worker between gradients")
    parser.add_argument("--checkpoint-seconds", type=float, default=0.7)
    parser.add_argument("--fsync", choices=["always", "interval", "off"], default="always")
    parser.add_argument("--no-journal", dest="journal", action="store_false")
    parser.add_argument(
        "--into", type=Path, help="folder for the evidence; by default the system's, and none is kept of a sound run"
    )
    options = parser.parse_args(words)
    names = [name for name, _ in options.method]
    if len(set(names)) != len(names):
        parser.error(f"a method may be named once, and these were: {', '.join(names)}")
    return options


def _method(word: str) -> tuple[str, int | None]:
    name, _, elements = word.partition(":")
    if name not in PRESETS or not (elements.isdecimal() or word == name):
        expected = f"one of {', '.join(PRESETS)}, and perhaps a colon and a number of elements"
        raise argparse.ArgumentTypeError(f"{word!r} came, and expected was {expected}")
    return name, int(elements) if elements else None


def shares(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each method's own part of the run."""
    return [
        argparse.Namespace(
            **vars(options)
            | {
                "method": name,
                "elements": elements or options.elements,
                "seconds": options.seconds / len(options.method),
            }
        )
        for name, elements in options.method
    ]


if __name__ == "__main__":
    main()
