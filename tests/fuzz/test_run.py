"""What ends a search: targets with something planted, which the real fuzzer has to find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="`make fuzz` installs it")
RUN = Path(__file__).parent / "run.py"
SOUND = "pass"
LEAK = "KEPT.append(bytearray(b'x' * 20_000))"
SPIKE = "assert len(fuzzed) < 30 or bytearray(b'x' * 400_000_000)"
WRONG = "assert not fuzzed.startswith(b'ab')"


def fuzzed(folder: Path, check: str) -> subprocess.CompletedProcess[str]:
    """Search for three seconds."""
    target = folder / "fuzz" / "planted.py"
    target.parent.mkdir()
    target.write_text(f"KEPT = []\ndef seeds():\n    yield b'aa'\ndef check(fuzzed):\n    {check}\n")
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder))))
    return subprocess.run(
        [sys.executable, RUN, "planted", "3"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


def test_search_that_finds_nothing_ends_well(tmp_path: Path) -> None:
    ended = fuzzed(tmp_path, SOUND)
    assert ended.returncode == 0, ended.stderr
    assert "stat::number_of_executed_units" in ended.stderr
    assert not list((tmp_path / "build").iterdir())


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        pytest.param(LEAK, "oom", id="what each execution leaves"),
        pytest.param(SPIKE, "oom", id="what one takes"),
        pytest.param(WRONG, "crash", id="what is misread"),
    ],
)
def test_search_ends_with_the_input_and_says_where_to_keep_it(tmp_path: Path, planted: str, kind: str) -> None:
    ended = fuzzed(tmp_path, planted)
    assert ended.returncode == 1
    assert "tests/fuzz/found/planted/" in ended.stderr
    (input_file,) = (tmp_path / "build").iterdir()
    assert input_file.name.startswith(f"planted-{kind}-")
