"""Settings of a method that can't be used: one sentence each, before anything starts."""

import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from ormo_runtime.timeouts import FailureDetection
from ormo_server.cli import main
from ormo_server.settings import ServerSettings

SAID = [
    ("--update-rule adam", "update rule 'adam' is not known: choose one of ormo, ormo-vanilla, ormo-nesterov, sgd"),
    ("--bucket median", "bucket 'median' is not known: choose one of sum, mean"),
    ("--bucket mean --method smega2", "bucket 'mean' with the update rule 'smega2', which averages by itself: use"),
    (
        "--step-scale half",
        "step scale 'half' is not known: choose one of constant, delay-adaptive, inverse, polynomial, rescaled",
    ),
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
    ("--learning-rate 1e308", "learning rate 1e+308: expected 1e-15 to 1e+06"),
    ("--learning-rate 5e-324", "learning rate 5e-324: expected 1e-15 to 1e+06"),
    ("--checkpoint-seconds 1e308", "--checkpoint-seconds is '1e308': input should be less than or equal to 1000000000"),
    ("--discard-delay 0", "--discard-delay is '0': input should be greater than or equal to 1"),
    ("--delay-compensation -1", "--delay-compensation is '-1': input should be greater than or equal to 0"),
]


# They are compared, and nothing is made of them.
UNBOUNDED = {"max_gradient_norm", "milestone_factor"}
FLOATS = [name for name, field in ServerSettings.model_fields.items() if "float" in str(field.annotation)]


@pytest.mark.parametrize("name", sorted({*FLOATS, "threads", "bucket_size", "stop_after_gradients"} - UNBOUNDED))
def test_a_number_that_nothing_can_be_made_of_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"less than|expected"):
        ServerSettings.model_validate({name: 1e308 if name in FLOATS else 2**63})


@pytest.mark.parametrize(
    "name", ["failure_timeout_seconds", "ticket_timeout_seconds", "checkpoint_seconds", "drain_seconds"]
)
def test_the_longest_time_of_a_setting_can_be_waited_for(name: str) -> None:
    (limit,) = [rule.le for rule in ServerSettings.model_fields[name].metadata if hasattr(rule, "le")]
    there = threading.Event()
    there.set()
    assert there.wait(limit)
    assert limit <= threading.TIMEOUT_MAX
    assert 1000 * FailureDetection(limit).ping_timeout_seconds < 2**31 or name != "failure_timeout_seconds"


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
    monkeypatch.setattr("ormo_server.cli._stop_signal", lambda _: None)  # signals are the test runner's
    (tmp_path / "notes.txt").write_text("precious\n")
    flags = ["--directory", str(tmp_path / "run"), "--metrics-listen", "", "--listen", "127.0.0.1:0"]
    for trace in (tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        assert main(["serve", *flags, "--trace", str(trace)]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("ormo-server: ")
        assert str(trace) in said
        assert "choose another --trace" in said
