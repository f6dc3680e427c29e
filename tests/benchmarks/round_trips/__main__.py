"""The command line: `make bench`."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.round_trips import kernel, report
from benchmarks.round_trips.contenders import NAMES, ORMO, USUAL
from benchmarks.round_trips.measure import Case, Row, measured
from ormo_runtime.process import keep_freed_memory

MB = 1_000_000
ONE_WORKER = [Case(4096, 1), Case(1_081_344, 1), Case(45 * MB, 1), Case(400 * MB, 1)]
MANY_WORKERS = [Case(4096, 4), Case(45 * MB, 4), Case(45 * MB, 16)]
QUICK = [Case(1_081_344, 2)]
# What plain gRPC takes there would be most of the benchmark's time.
_LEFT_OUT = {("grpcio + protobuf", Case(45 * MB, 16))}


def main() -> None:
    """Measure, and show what was found."""
    options = _options()
    keep_freed_memory()  # as the server does, whose update rules are measured in this process
    options.into.mkdir(parents=True, exist_ok=True)
    names = [name for name in options.contenders if name != "pyzmq" or find_spec("zmq")]
    rows: list[Row] = []
    _say(report.HEADER)
    for case in _cases(options):
        wanted = [name for name in names if (name, case) not in _LEFT_OUT]
        found = measured(case, wanted, options.pairs if case.workers == 1 else options.windows, options.seconds)
        rows += found
        for row in found:
            _say(report.line(row))
    _say(f"\nTimes the socket's time:\n\n{report.summary(rows)}\n")
    for told in report.beside_the_best(rows):
        _say(told)
    for row in rows:
        if row.contender == ORMO:
            _say(report.stages(row))
    if options.only is None:
        _say(f"\n{kernel.HEADER}")
        for size in [45 * MB] if options.quick else [45 * MB, 400 * MB]:
            for update in kernel.measured(size, options.pairs):
                _say(kernel.line(update))
    report.write_csv(rows, options.into / "bench.csv")
    report.draw(rows, options.into / "bench.png")
    _say(f"\nwritten: {options.into / 'bench.csv'}, {options.into / 'bench.png'}")


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.quick:
        return QUICK
    cases = [*ONE_WORKER, *MANY_WORKERS]
    return [case for case in cases if options.only is None or f"{case.size}x{case.workers}" in options.only]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case, for breakage and not for speed")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="BYTESxWORKERS",
        help="cases, such as 45000000x1; by default all, and the update rules besides",
    )
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=USUAL, help="besides the socket")
    parser.add_argument("--pairs", type=int, help="turns of each contender, each after one of the socket")
    parser.add_argument("--windows", type=int, help="the same, with several workers")
    parser.add_argument("--seconds", type=float, help="length of a turn with several workers")
    parser.add_argument("--into", type=Path, default=Path("build/bench"), help="folder for the CSV and the picture")
    options = parser.parse_args()
    usual = (2, 1, 0.3) if options.quick else (9, 3, 1.5)
    options.pairs, options.windows, options.seconds = (
        given if given is not None else default
        for given, default in zip((options.pairs, options.windows, options.seconds), usual, strict=True)
    )
    return options


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
