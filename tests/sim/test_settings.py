"""Settings of a simulation: what is refused, and that a refusal is one clear sentence."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ormo_runtime.settings_loader import SettingsProblemsError, read_settings
from ormo_server.sim import cli
from ormo_server.sim.settings import SimSettings


def settings(*flags: str) -> SimSettings:
    return read_settings(SimSettings, flags, {}, program="ormo-sim")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learning-rate", "-1"], "--learning-rate is '-1': input should be greater than 0"),
        (["--momentum", "1"], "--momentum is '1': input should be less than 1"),
        (["--bucket-size", "0"], "--bucket-size is '0': input should be greater than or equal to 1"),
        (["--update-rule", "adam"], "update rule 'adam' is not known: choose one of ormo, "),
        (["--method", "magic"], "method 'magic' is not known: choose one of ormo, ormo-da, "),
        (["--step-scale", "big"], "step scale 'big' is not known"),
        (["--scheduler", "bounded-staleness"], "the bounded-staleness scheduler needs a staleness bound"),
        (["--staleness-bound", "4"], "staleness bound 4 with the asynchronous scheduler, which has none"),
        (["--workers", "0"], "--workers is '0'"),
        (["--slow", "fast"], "'fast' was given, expected COUNT:FACTORx"),
        (["--workers", "3", "--slow", "4:10x"], "4:10x makes 4 workers slower, but there are only 3"),
        (["--compute-seconds", "normal:1"], "compute time 'normal:1': expected constant:MEAN, normal:MEAN,DEVIATION"),
        (["--latency-seconds", "-1"], "--latency-seconds is '-1': expected one number or more, each at least 0"),
        (["--bandwidth-bytes-per-second", "fast"], "--bandwidth-bytes-per-second is 'fast'"),
        (["--join", "soon"], "join 'soon': expected SECONDS:NUMBER"),
        (["--crash", "5:16"], "crash 5:16: no worker 16 exists: workers are numbered from 0 to 15"),
        (["--leave", "5:20", "--join", "1:4"], "leave 5:20: no worker 20 exists: workers are numbered from 0 to 19"),
        (["--epochs", "0"], "--epochs is '0'"),
        (
            ["--trace", "t.jsonl", "--workers", "4"],
            "--trace and --workers can't be combined: drop --workers, or",
        ),
        (["--inner", "adamw"], "--inner is for local steps: say how many with --local-steps"),
        (["--local-steps", "4", "--inner-lr", "0"], "--inner-lr is '0': input should be greater than 0"),
        (["--speed", "3"], "unknown flag --speed"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(flags: Sequence[str], sentence: str) -> None:
    with pytest.raises(SettingsProblemsError) as refused:
        settings(*flags)
    assert len(refused.value.problems) == 1
    assert sentence in refused.value.problems[0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--trace", "none.jsonl"], "the trace none.jsonl can't be read"),
        (["--trace", "text"], "text, line 1: not JSON"),
        (["--compute-seconds", "trace:none.csv"], "the trace none.csv can't be read"),
        (["--workload", "nowhere:Nothing"], "the workload 'nowhere:Nothing' can't be imported"),
        (["--workload", "sim.by_ticket:nothing"], "the workload 'sim.by_ticket:nothing' can't be imported"),
        (["--task", "nothing"], "there is no task named 'nothing'"),
    ],
)
def test_what_is_found_out_later_is_one_sentence_too(
    flags: Sequence[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("hello\n")
    task = [] if "--task" in flags or "--workload" in flags else ["--workload", "sim.by_ticket:workload"]
    assert cli.main([*flags, *task, "--directory", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ormo-sim: ")
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_changes_come_in_the_forms_of_the_help() -> None:
    told = settings("--join", "10:2,20.5:1", "--leave", "30:3", "--crash", "5:0")
    assert [(change.seconds, change.kind, change.number) for change in told.changes()] == [
        (10.0, "join", 2),
        (20.5, "join", 1),
        (30.0, "leave", 3),
        (5.0, "crash", 0),
    ]
