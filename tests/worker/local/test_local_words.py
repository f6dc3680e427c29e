"""What `ormo-local` shows of its programs' last words, which may quote anything."""

from pathlib import Path

import pytest

from ormo_worker.local import cli
from ormo_worker.local.cluster import Child, Cluster, ClusterError


def test_last_words_are_shown_with_escapes(tmp_path: Path) -> None:
    child = Child.__new__(Child)
    child.log_path = tmp_path / "worker-0.log"
    child.log_path.write_bytes(b"first\nit said \x1b[2J\x07 and went\n")
    assert child.last_words(1) == r"it said \x1b[2J\x07 and went"
    assert child.last_words().startswith("first\n")


def test_what_a_program_prints_is_read_to_its_end_whatever_it_is(tmp_path: Path) -> None:
    """Else its pipe would fill up, and it would wait for ever."""
    (tmp_path / "noisy.py").write_text('import sys; sys.stdout.buffer.write(b"a=1 \\xff\\nb=2\\n")')
    child = Child("noisy", "noisy", [], {"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "0", "LC_ALL": "C"}, tmp_path)
    assert list(child.output) == ["a=1 \ufffd\n", "b=2\n"]
    assert child.stop() == 0


def test_last_words_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bracket that closes nothing would be an error of its own."""

    def fails(*_: object) -> None:
        raise ClusterError("the server said [/red] [bold]loudly")

    monkeypatch.setattr("signal.signal", lambda *_: None)  # signals are the test runner's
    monkeypatch.setattr(cli, "refuse_unusable_task", lambda _: None)
    monkeypatch.setattr(Cluster, "start", fails)
    directory = tmp_path / "[b]run"
    assert cli.main(["--directory", str(directory)]) == 1
    shown = capsys.readouterr().out
    assert "ormo-local: the server said [/red] [bold]loudly" in shown
    assert f"{directory}/logs".replace("\n", "") in shown.replace("\n", "")
