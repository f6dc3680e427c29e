"""Settings of a method that can't be used: one sentence each, before anything starts."""

from pathlib import Path

import pytest

from ormo_server.cli import main

SAID = [
    ("--update-rule adam", "update rule 'adam' is not known: choose one of ormo, ormo-vanilla, sgd, naive, shifted"),
    ("--step-scale half", "step scale 'half' is not known: choose one of constant, delay-adaptive, inverse, rescaled"),
    ("--scheduler ssp", "scheduler 'ssp' is not known: choose one of asynchronous, synchronous, bounded-staleness"),
    ("--scheduler bounded-staleness", "needs a staleness bound: the largest delay that an applied gradient may have"),
    ("--staleness-bound 3", "staleness bound 3 with the asynchronous scheduler, which has none: leave it out, or"),
    ("--method ssgd --staleness-bound 3", "staleness bound 3 with the synchronous scheduler, which has none"),
    ("--method ssgdm --bucket-size 4", "its buckets are its rounds, leave the bucket size out"),
    ("--staleness-bound -1", "--staleness-bound is '-1': input should be greater than or equal to 0"),
    ("--bucket-size 0", "--bucket-size is '0': input should be greater than or equal to 1"),
    ("--momentum 1.5", "--momentum is '1.5': input should be less than 1"),
    ("--momentum -0.1", "--momentum is '-0.1': input should be greater than or equal to 0"),
    ("--learning-rate -1", "--learning-rate is '-1': input should be greater than 0"),
    ("--learning-rate nan", "--learning-rate is 'nan': input should be a finite number"),
    ("--discard-delay 0", "--discard-delay is '0': input should be greater than or equal to 1"),
    ("--delay-compensation -1", "--delay-compensation is '-1': input should be greater than or equal to 0"),
]


@pytest.mark.parametrize(("flags", "sentence"), SAID)
def test_settings_that_make_no_method_are_refused(
    capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *flags.split()])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said


def test_trace_that_cannot_be_written_is_refused_before_anything_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ormo_server.cli._stop_signal", lambda: None)  # signals are the test runner's
    (tmp_path / "notes.txt").write_text("precious\n")
    flags = ["--directory", str(tmp_path / "run"), "--metrics-listen", "", "--listen", "127.0.0.1:0"]
    for trace in (tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        assert main(["serve", *flags, "--trace", str(trace)]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("ormo-server: ")
        assert str(trace) in said
        assert "choose another --trace" in said
