"""Fuzz one target, guided by what it covers: `python run.py fuzz_framing 60`. Prints how often it was executed.

An input ends the search if it is misread, if it takes longer than 10 s, or if by then more memory is in use than right
after the seeds and `GROWTH_MB` on top, be that a leak or the one input's doing.
"""

import contextlib
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris
import psutil
from corpus import found  # beside this program

LONGEST = 2048  # room for some exchanges, each with several requests
GROWTH_MB = (
    150  # sound targets grew by less than 50 in 600 s; each execution may leave 150 bytes if there are 1,000,000
)
HANG_SECONDS = 10
INSTRUMENTED = ["fuzz", "ormo_protos.framing", "ormo_server.service", "ormo_server.journal", "ormo_server.store"]


def main(name: str, seconds: str, *here: str) -> None:
    """Fuzz in a process of its own, which ends where something is found, and say what to do then."""
    if here:
        fuzz(name, seconds)
        return
    Path("build").mkdir(exist_ok=True)
    if subprocess.run([sys.executable, __file__, name, seconds, "here"], check=False).returncode:
        sys.exit(
            f"{name} found something: the input is the newest file build/{name}-*. Once it is mended, keep the input "
            f"in tests/fuzz/found/{name}/ under a name that says what it is: it is a seed from then on, and a test."
        )


def fuzz(name: str, seconds: str) -> None:
    """Let atheris try inputs, from the seeds and from what was found before."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = importlib.import_module(f"fuzz.{name}")
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(starts(name, target)):
            with contextlib.suppress(Exception):  # atheris finds it anew, and writes it down
                target.check(seed)
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_total_time={seconds}", f"-max_len={getattr(target, 'LONGEST_BYTES', LONGEST)}"]
        limits += [f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={memory_mb() + GROWTH_MB}"]
        flags = [*limits, "-print_final_stats=1", f"-artifact_prefix=build/{name}-"]
        atheris.Setup([name, *flags, corpus], target.check)
        atheris.Fuzz()


def starts(name: str, target: Any) -> Iterator[bytes]:
    """What the search starts from."""
    yield from target.seeds()
    yield from found(name).values()


def memory_mb() -> int:
    """What this process has in use."""
    return psutil.Process().memory_info().rss >> 20


if __name__ == "__main__":
    main(*sys.argv[1:])
