"""Fuzz one target, guided by what it covers: `python run.py fuzz_framing 60`. Prints how often it was executed."""

import importlib
import sys
import tempfile
from pathlib import Path

import atheris

LONGEST = 2048  # room for some exchanges, each with several requests


def main(name: str, seconds: str) -> None:
    """Let atheris try inputs, from the target's own seeds on; what it finds is written to build/."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with atheris.instrument_imports(
        include=["fuzz", "ormo_protos.framing", "ormo_server.service", "ormo_server.journal", "ormo_server.store"]
    ):
        target = importlib.import_module(f"fuzz.{name}")
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds()):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        Path("build").mkdir(exist_ok=True)
        limits = [f"-max_total_time={seconds}", f"-max_len={getattr(target, 'LONGEST_BYTES', LONGEST)}", "-timeout=10"]
        flags = [*limits, "-print_final_stats=1", f"-artifact_prefix=build/{name}-"]
        atheris.Setup([name, *flags, corpus], target.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
