"""Wrong use of the programs: one clear sentence on stderr, a fitting exit code, no traceback."""

import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ormo_worker.tasks.digits import Digits
from system.programs import Program, Stage, as_flags


def run(stage: Stage, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The exit code and what was said."""
    program: Program = stage.program("bad", *arguments, module=module, environment=environment)
    code = program.wait(60)
    said = program.log.read_text()
    assert "Traceback" not in said, said
    return code, said


SERVER = [
    (["serve", "--momentum", "1"], 2, "--momentum is '1': input should be less than 1"),
    (["serve", "--lerning-rate", "1"], 2, "did you mean --learning-rate?"),
    (["serve", "--method", "adam"], 2, "method 'adam' is not known: choose one of ormo, ormo-da, ormo-vanilla, asgd"),
    (["serve", "--scheduler", "bounded-staleness"], 2, "needs a staleness bound: the largest delay that an applied"),
    (["serve", "--method", "ssgd", "--bucket-size", "2"], 2, "leave the bucket size out"),
    (["serve", "--schedule", "milestones"], 2, "needs at least one milestone"),
    (["serve", "--listen", "here"], 2, "--listen is 'here'"),
    (["serve", "--config", "missing.toml"], 2, "missing.toml can't be read"),
    (["serve", "--directory", "/proc/nowhere"], 1, "choose another --directory"),
    (["serve", "--model", "missing.safetensors"], 1, "missing.safetensors"),
    (
        ["serve", "--trace", "."],
        1,
        "can't write the trace .: Is a directory; make it writable or choose another --trace",
    ),
    (["status", "--server", "127.0.0.1:1"], 1, "no answer from 127.0.0.1:1"),
    (["train"], 2, "expected serve or status or top"),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), SERVER)
def test_server_says_what_is_wrong(stage: Stage, arguments: list[str], code: int, sentence: str) -> None:
    got, said = run(stage, "ormo_server", *arguments)
    assert sentence in said
    assert got == code


WORKER = [
    (["run", "--task", "imagenet"], 2, "imagenet"),
    (["run", "--task", "image-folder", "--data-dir", "nowhere"], 2, "nowhere"),
    (["run", "--server", "127.0.0.1:1", "--connect-timeout-seconds", "1"], 1, "127.0.0.1:1"),
    (["run", "--batch-size", "0"], 2, "--batch-size is '0'"),
    (["evaluate", "--server", "127.0.0.1:1", "--connect-timeout-seconds", "1"], 1, "127.0.0.1:1"),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), WORKER)
def test_worker_says_what_is_wrong(stage: Stage, arguments: list[str], code: int, sentence: str) -> None:
    got, said = run(stage, "ormo_worker", *arguments)
    assert sentence in said
    assert got == code


def test_setting_from_environment_or_file_is_named_with_its_place(stage: Stage) -> None:
    code, said = run(stage, "ormo_server", "serve", environment={"ORMO_MAX_WORKERS": "none"})
    assert (code, "from the environment, ORMO_MAX_WORKERS" in said) == (2, True)
    (stage.folder / "run.toml").write_text("momentum = 3")
    code, said = run(stage, "ormo_server", "serve", "--config", "run.toml")
    assert (code, "(from run.toml)" in said) == (2, True)


def test_port_and_directory_in_use_are_told_apart(stage: Stage) -> None:
    stage.server()
    flags = as_flags({"listen": stage.address, "metrics-listen": "", "directory": "other"})
    code, said = run(stage, "ormo_server", "serve", *flags)
    assert (code, f"can't listen on {stage.address}" in said) == (1, True)
    code, said = run(stage, "ormo_server", "serve", "--directory", "run", "--listen", "127.0.0.1:0")
    assert (code, "in use by another program" in said) == (1, True)


def test_worker_waits_for_a_server_that_is_not_up_yet(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        stage.address = f"127.0.0.1:{free.getsockname()[1]}"
        worker = stage.worker("early", leave_after_gradients=5)
        free.settimeout(60)
        free.accept()[0].close()  # it has asked, and nobody was there
    assert worker.process.poll() is None
    stage.server()
    assert worker.wait() == 0
    assert stage.status().applied == 5


OTHER_TASK = """
import torch
from ormo_worker.tasks.digits import Digits

class Other(Digits):
    def build_model(self):
        return torch.nn.Linear(3, 4)
"""


def test_worker_with_another_model_is_told_which_tensors_differ(stage: Stage) -> None:
    (stage.folder / "other.py").write_text(OTHER_TASK)
    stage.server()
    assert stage.worker("right", leave_after_gradients=2).wait() == 0
    other = stage.worker("wrong", task="other.py:Other")
    assert other.wait() in (1, 2)
    said = other.log.read_text()
    assert "weight" in said
    assert "Traceback" not in said
    assert stage.status().applied == 2


def test_worker_with_another_model_is_told_so_also_when_the_run_is_over(stage: Stage) -> None:
    (stage.folder / "other.py").write_text(OTHER_TASK)
    stage.server(stop_after_gradients=2)
    assert stage.worker("right").wait() == 0
    other = stage.worker("wrong", task="other.py:Other")
    assert other.wait() == 1
    assert "trains another model than this worker has" in other.log.read_text()
    late = stage.worker("late")
    assert late.wait() == 0
    assert "the run is already over, at iteration 2" in late.log.read_text()


def test_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(stage: Stage) -> None:
    server = stage.server()
    assert stage.worker("a", leave_after_gradients=3).wait() == 0
    assert server.terminate() == 0
    newest = stage.model().with_name("state.safetensors")
    assert newest.parent.name.endswith("iteration-3")
    with newest.open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff\xff\xff")
    server = stage.server()
    said = server.log.read_text()
    assert "ERROR" in said
    assert newest.parent.name in said
    assert stage.status().iteration.number == 0


def test_run_starts_from_a_plain_state_dict_file(stage: Stage) -> None:
    torch.manual_seed(1)
    start = Digits().build_model()
    safetensors.torch.save_file(start.state_dict(), stage.folder / "start.safetensors")
    server = stage.server(model="start.safetensors", stop_after_gradients=1, learning_rate=1e-9)
    assert stage.worker("a").wait() == 0
    assert server.terminate() == 0
    trained = safetensors.torch.load_file(stage.model())
    for name, parameter in start.named_parameters():
        assert torch.allclose(trained[name], parameter, atol=1e-6), name


def test_evaluator_sees_what_was_trained(stage: Stage) -> None:
    stage.server(stop_after_gradients=100, learning_rate=0.02)
    assert stage.worker("a").wait() == 0
    evaluator = stage.program("evaluator", "evaluate", "--server", stage.address, "--once", module="ormo_worker")
    code, output = evaluator.printed()
    assert code == 0
    fields = dict(word.split("=") for word in output.split() if "=" in word)
    assert int(fields["iteration"]) == 100
    assert 0.3 < float(fields["accuracy"]) <= 1.0
    assert Path(stage.folder / "run").is_dir()
