"""The measurement of memory, on a small model: it counts what it says, and fails above its limit."""

import sys

import pytest

from benchmarks import memory


def test_an_exchange_takes_at_least_its_own_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "_SECONDS", 0.5)
    monkeypatch.setattr(sys, "argv", ["memory.py", "--case", "20000000", "2", "0.99"])
    with pytest.raises(SystemExit, match="an exchange takes more memory than that"):
        memory.main()
    assert capsys.readouterr().out.startswith("2 × 20 MB: 1.")
