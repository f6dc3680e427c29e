"""The training loop for a task, in this process, against the fake server."""

import time
from typing import Any

import pytest
import torch

from ormo_worker import training
from ormo_worker.pytorch.options import decay_groups
from ormo_worker.settings import RunSettings
from ormo_worker.tasks import TaskError
from ormo_worker.tasks.batches import batches
from ormo_worker.training import run
from worker.fake_server import FakeServer, refuse
from worker.lines import Lines

LINES = "worker.lines:Lines"


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(server: FakeServer, **more: Any) -> RunSettings:
    return RunSettings(
        server=server.address, task=LINES, batch_size=4, device="cpu", connect_timeout_seconds=5.0, **more
    )


def trained(server: FakeServer) -> float:
    assert server.model is not None
    return float(server.model.parameters[0])


def test_a_task_is_trained_until_the_run_is_over(server: FakeServer) -> None:
    server.stop_after = 40
    run(settings(server))
    assert trained(server) == pytest.approx(3.0, abs=1e-2)
    assert server.asked[-1] == "leave"
    assert server.iteration == 40
    assert all(announced.HasField("loss") for announced in server.announced)
    assert server.samples == 160


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains_as_well(server: FakeServer, amp: str) -> None:
    server.stop_after = 40
    run(settings(server, amp=amp))
    assert trained(server) == pytest.approx(3.0, abs=0.1)


def test_a_worker_can_leave_before_the_end(server: FakeServer) -> None:
    run(settings(server, leave_after_gradients=3))
    assert server.iteration == 3
    assert server.asked[-1] == "leave"


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_worker_with_gradients_in_flight_leaves_after_as_many(
    server: FakeServer, caplog: pytest.LogCaptureFixture, stop_after: int
) -> None:
    with caplog.at_level("INFO"):
        run(settings(server, leave_after_gradients=stop_after, in_flight=2))
    assert server.iteration == stop_after
    # What the other slot had asked for is on another stream, and may come after it.
    assert {each.split()[0] for each in server.asked[server.asked.index("leave") :]} <= {"leave", "ask"}
    assert f": {stop_after} gradients from this worker in" in caplog.text


def test_a_task_is_trained_with_gradients_in_flight_until_the_run_is_over(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop_after = 40
    with caplog.at_level("INFO"):
        run(settings(server, in_flight=2))
    assert trained(server) == pytest.approx(3.0, abs=1e-2)
    assert "the run is over at iteration 40: 40 gradients from this worker" in caplog.text


def test_a_run_that_is_over_is_left_at_once(server: FakeServer) -> None:
    run(settings(server, leave_after_gradients=1))
    server.stop_after, server.iteration = 1, 1
    run(settings(server))
    assert server.iteration == 1


def test_a_slow_worker_takes_longer_and_says_so(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slept, sleep = [], time.sleep

    def note(seconds: float) -> None:
        slept.append(seconds)
        sleep(seconds)

    monkeypatch.setattr("ormo_worker.training.time.sleep", note)
    run(settings(server, leave_after_gradients=3))
    assert not slept
    server.iteration = 0
    server.announced.clear()
    run(settings(server, leave_after_gradients=3, slow_factor=20.0))
    # It sleeps for 19 times as long as it computed, so both together are 20 nineteenths of that.
    told = [announced.compute_seconds for announced in server.announced]
    assert len(told) == len(slept) == 3
    assert all(seconds >= 20 / 19 * each > 0 for seconds, each in zip(told, slept, strict=True))


def test_batches_larger_than_the_data_set_count_what_there_is(server: FakeServer) -> None:
    run(settings(server, leave_after_gradients=1).model_copy(update={"batch_size": 100}))
    assert server.samples == 8


def test_the_task_scales_the_weight_decay(server: FakeServer) -> None:
    task = Lines()
    (group,) = decay_groups(task.build_model(), task.weight_decay_scale)
    assert group["weight_decay_scale"] == 0.25
    assert [name for name, _ in group["params"]] == ["0.weight"]


def test_the_first_worker_starts_the_run_from_its_seed(server: FakeServer) -> None:
    run(settings(server, leave_after_gradients=1, seed=3).model_copy(update={"task": "digits"}))
    first, server.manifest = server.model, None
    assert first is not None
    start = first.parameters + 0.5 * server.gradients[0]
    run(settings(server, leave_after_gradients=1, seed=3).model_copy(update={"task": "digits"}))
    assert server.model is not None
    torch.testing.assert_close(server.model.parameters + 0.5 * server.gradients[1], start)


def test_a_set_without_data_is_an_error_before_the_run_is_joined(server: FakeServer) -> None:
    with pytest.raises(TaskError, match="is empty"):
        run(settings(server).model_copy(update={"task": "worker.lines:NoData"}))
    assert server.asked == []


def test_refused_gradients_do_not_count_as_the_workers(server: FakeServer) -> None:
    server.told(("received", lambda context: server.slots.clear()))
    run(settings(server, leave_after_gradients=2))
    assert server.iteration == 2


def test_a_line_is_logged_every_few_seconds(
    server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ormo_worker.training._SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO"):
        run(settings(server, leave_after_gradients=2))
    assert "iteration 2: 2 gradients from this worker" in caplog.text
    assert "left the run at iteration 2: 2 gradients from this worker in" in caplog.text


def test_a_busy_server_slows_the_loop_down_and_no_more(server: FakeServer) -> None:
    server.told(("exchange", refuse("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS", retry_seconds=0.2)))
    start = time.monotonic()
    run(settings(server, leave_after_gradients=2))
    assert time.monotonic() - start >= 0.2
    assert server.iteration == 2


def test_loader_processes_are_passed_to_the_stream_of_batches(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop_after = 1
    asked = []

    def recording(dataset: Any, batch_size: int, seed: int, *, loader_processes: int = 0) -> Any:
        asked.append(loader_processes)
        return batches(dataset, batch_size, seed)

    monkeypatch.setattr(training, "batches", recording)
    run(settings(server, loader_processes=3))
    assert asked[-1] == 3


@pytest.mark.parametrize(("inner", "amp"), [("adamw", "off"), ("sgd", "float16")])
def test_a_task_is_trained_with_local_steps_of_a_named_optimizer(server: FakeServer, inner: str, amp: str) -> None:
    server.stop_after, server.local_steps = 40, 5
    run(settings(server, inner=inner, inner_lr=0.2, inner_schedule="cosine", amp=amp))
    assert trained(server) == pytest.approx(3.0, abs=0.1)
    assert {announced.local_steps for announced in server.announced} == {5}
    assert server.samples == 40 * 5 * 4


def test_inner_rates_follow_the_run_and_begin_low(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop_after, server.local_steps = 10, 2
    rates: list[float] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Noting)
    run(settings(server, inner="sgd", inner_lr=0.2, inner_warmup=0.2))
    assert rates == pytest.approx([0.2 / 2000, 0.4 / 2000, 0.1, 0.1] + [0.2] * 16)
