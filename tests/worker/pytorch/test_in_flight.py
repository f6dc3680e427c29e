"""Several gradients in flight: the next one is computed while the last one travels, and nothing else changes."""

import gc
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ormo_protos.limits import MAX_SLOTS
from ormo_protos.manifest import FLOAT32
from ormo_protos.refusals import Reason
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import ClientClosed, OptionRefused, Refused, RunFinished
from ormo_worker.local.cluster import Cluster, LocalSettings
from ormo_worker.pytorch import leaving
from ormo_worker.pytorch.devices import Copies
from ormo_worker.pytorch.pipeline import Gathered, InFlight
from ormo_worker.pytorch.transfer import Staging
from ormo_worker.settings import RunSettings
from service.wire import eventually
from worker.fake_server import LEARNING_RATE, LOST, FakeServer, refuse
from worker.models import line
from worker.pytorch.loops import PATIENT_SECONDS, Loop
from worker.pytorch.streams import LateStreams


class ConsistentServer(FakeServer):
    """Parameters and their iteration are read in one go, though several streams are open."""

    def _delivery(self, *asked: Any) -> Any:
        with self.lock:
            return super()._delivery(*asked)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = ConsistentServer().start()
    yield fake
    fake.stop()


@pytest.fixture
def loop(server: FakeServer) -> Loop:
    return Loop(server.address)


@pytest.fixture(autouse=True)
def _closed_in_the_end(server: FakeServer) -> Iterator[None]:
    yield
    Loop.close_all()


def held(event: threading.Event, seconds: float = PATIENT_SECONDS) -> Callable[[Any], None]:
    """A fault: the server goes on when the event comes."""
    return lambda _: assert_(event.wait(seconds))


def assert_(condition: bool) -> None:
    assert condition


def names_of_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("ormo-slot"))


# What it is for.


@pytest.mark.parametrize(("in_flight", "expected"), [(1, False), (2, True), (3, True)])
def test_next_gradient_is_computed_before_the_last_one_is_answered(
    server: FakeServer, in_flight: int, *, expected: bool
) -> None:
    computing, found = threading.Event(), []
    loop = Loop(server.address, in_flight)
    # With one slot the answer would never come.
    server.told(("received", lambda _: found.append(computing.wait(PATIENT_SECONDS if expected else 0.1))))
    loop.step()
    computing.set()
    loop.step()
    loop.optimizer.close()
    assert found == [expected]


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_every_gradient_is_that_of_the_parameters_of_its_ticket(server: FakeServer, in_flight: int) -> None:
    loop = Loop(server.address, in_flight)
    loop.wait()
    for _ in range(20):
        loop.step()
    loop.optimizer.close()
    weights = [2.0]
    for gradient in server.gradients:
        weights.append(weights[-1] - LEARNING_RATE * gradient.item())
    assert len(server.gradients) == 20
    tickets = [announced.ticket.iteration for announced in server.announced]
    assert [gradient.item() for gradient in server.gradients] == [weights[iteration] for iteration in tickets]
    delays = [iteration - ticket for iteration, ticket in enumerate(tickets)]
    assert (max(delays) == 0) == (in_flight == 1)


def test_all_of_a_gradients_travel_in_a_payload_of_its_own(server: FakeServer) -> None:
    model = nn.Linear(300, 300)  # large enough to be on its way for a while
    go_on = threading.Event()
    with RemoteOptimizer(model, server.address, in_flight=2) as optimizer:
        server.told(("received", held(go_on)))
        for value in (1.0, 2.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, value)
            if value == 2.0:
                go_on.set()
            optimizer.step()
    # Each travels on a stream of its own, so either may be the first to arrive.
    assert sorted(gradient.unique().tolist() for gradient in server.gradients) == [[1.0], [2.0]]


def test_result_is_that_of_the_last_gradient_whose_outcome_is_known(server: FakeServer, loop: Loop) -> None:
    assert (loop.optimizer.last_result, loop.optimizer.iteration) == (None, 0)
    loop.wait()
    loop.step_and_wait()
    assert (loop.optimizer.last_result, loop.optimizer.counted, loop.optimizer.under_way) == (None, 0, 1)
    assert loop.optimizer.iteration == 0
    for known in range(1, 5):
        loop.step_and_wait()
        assert loop.optimizer.last_result is not None
        assert loop.optimizer.last_result.iteration.number == loop.optimizer.counted == known
        assert (loop.optimizer.under_way, loop.optimizer.iteration) == (1, known)
    loop.optimizer.close()
    assert (loop.optimizer.counted, loop.optimizer.under_way) == (5, 0)
    assert loop.optimizer.last_result.iteration.number == 5


def test_parameters_that_a_slot_begins_with_take_no_result_back(server: FakeServer) -> None:
    late = threading.Event()
    server.told(("exchange", lambda _: None), ("exchange", held(late)))
    loop = Loop(server.address)
    eventually(lambda: not server.faults)  # the other slot asks when the first has its parameters
    loop.step()
    known = loop.optimizer.last_result
    assert known is not None  # of the one slot that works
    late.set()
    loop.wait()
    loop.step()
    assert loop.optimizer.last_result is known


def test_one_in_flight_has_no_thread_and_asks_for_one_slot(server: FakeServer) -> None:
    loop = Loop(server.address, in_flight=1)
    loop.step()
    assert names_of_threads() == []
    assert server.asked == ["join", "offer", "join", "ask 1", "push 2"]
    assert set(server.slots) == {(loop.optimizer._client.identity.worker, 0)}
    loop.optimizer.close()


def test_each_slot_has_a_thread_until_the_worker_leaves(server: FakeServer) -> None:
    loop = Loop(server.address, in_flight=3)
    assert names_of_threads() == ["ormo-slot-0", "ormo-slot-1", "ormo-slot-2"]
    loop.optimizer.close()
    assert names_of_threads() == []


# What goes on in a loop.


def test_refused_gradients_are_counted_and_training_goes_on(
    caplog: pytest.LogCaptureFixture, server: FakeServer, loop: Loop
) -> None:
    with caplog.at_level(logging.INFO):
        for factor in (math.nan, 1.0, math.inf, 1.0):
            loop.step(factor)
        loop.optimizer.close()
    assert loop.optimizer.refusals == {Reason.NON_FINITE: 2}
    assert [record.levelname for record in caplog.records if "refused" in record.message] == ["WARNING"]
    assert (loop.optimizer.counted, server.iteration) == (2, 2)


def test_a_grad_scaler_may_skip_a_step(server: FakeServer, loop: Loop) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, math.inf, 3.0):
        loop.optimizer.zero_grad()
        scaler.scale(loop.model(torch.tensor([[factor]])).sum()).backward()
        scaler.step(loop.optimizer, samples=8)
        scaler.update()
    loop.optimizer.close()
    assert sorted(gradient.item() for gradient in server.gradients) == [1.0, 3.0]
    assert [announced.samples for announced in server.announced] == [8, 8]
    assert loop.optimizer.last_result is not None


def test_closures_and_accumulated_gradients_are_pushed_with_their_samples_and_losses(
    server: FakeServer, loop: Loop
) -> None:
    def closure() -> torch.Tensor:
        loop.optimizer.zero_grad()
        loss = loop.model(torch.tensor([[3.0]])).sum()
        loss.backward()
        return loss

    assert loop.optimizer.step(closure, samples=4).item() == 6.0
    loop.optimizer.zero_grad()
    for factor in (1.0, 2.0):
        loop.model(torch.tensor([[factor]])).sum().backward()
    loop.optimizer.step(samples=16, loss=0.25)
    loop.optimizer.close()
    assert {(announced.samples, announced.loss) for announced in server.announced} == {(4, 6.0), (16, 0.25)}
    assert [gradient.item() for gradient in server.gradients] == [3.0, 3.0]


def test_weight_decay_is_that_of_the_parameters_that_the_gradient_was_computed_at(server: FakeServer) -> None:
    server.weight_decay = 0.5
    loop = Loop(server.address)
    loop.wait()
    loop.step()
    loop.step()
    loop.optimizer.close()
    assert [gradient.item() for gradient in server.gradients] == [3.0, 3.0]  # both at the first parameters


@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_step_that_finds_out_about_the_end_loads_the_last_parameters_once(server: FakeServer, stop_after: int) -> None:
    server.stop_after = stop_after
    loop = Loop(server.address)
    while not loop.optimizer.finished:
        loop.step()
    assert len(loop.pushed) in (stop_after, stop_after + 1)
    assert server.asked.count("pull") == 1
    assert (server.iteration, loop.optimizer.iteration, loop.optimizer.counted) == (stop_after,) * 3
    assert server.model is not None
    assert loop.model.weight.item() == server.model.parameters.item()
    assert loop.optimizer.refusals == {}
    with pytest.raises(RunFinished, match=f"the run is over at iteration {stop_after}"):
        loop.step()
    loop.optimizer.close()


def test_run_that_is_over_gives_its_parameters_to_a_late_worker(server: FakeServer, loop: Loop) -> None:
    server.stop_after, server.iteration = 1, 1
    late = Loop(server.address)
    assert late.optimizer.finished
    late.optimizer.close()


# What goes wrong.


def test_all_slots_survive_broken_connections(server: FakeServer, loop: Loop) -> None:
    server.told(("result", LOST), ("exchange", LOST), ("delivery", LOST))
    for _ in range(6):
        loop.step()
    loop.optimizer.close()
    assert (server.iteration, loop.optimizer.counted) == (6, 6)


def test_worker_that_is_forgotten_joins_once_for_all_its_slots(server: FakeServer, loop: Loop) -> None:
    for _ in range(3):
        loop.step()
    joins = server.asked.count("join")
    server.told(("exchange", server.forget_workers))
    for _ in range(6):
        loop.step()
    loop.optimizer.close()
    assert server.asked.count("join") == joins + 1
    # Of the gradients whose tickets were forgotten with the worker nothing is left.
    assert loop.optimizer.counted == server.iteration
    assert server.iteration + loop.optimizer.refusals[Reason.TICKET_UNKNOWN] == 9


def test_server_that_lost_everything_gets_the_model_from_a_slots_thread(server: FakeServer, loop: Loop) -> None:
    loop.step()
    loop.step()
    eventually(lambda: server.iteration == 2)
    server.forget_workers()
    server.manifest = server.model = None
    loop.step()
    loop.step()
    loop.optimizer.close()
    assert server.asked.count("offer") == 2
    assert server.model is not None


def test_model_is_not_offered_half_loaded(server: FakeServer) -> None:
    staging = Staging(line(weight=1.0))
    snapshots: list[float] = []
    thread = threading.Thread(target=lambda: snapshots.append(staging.snapshot().parameters.item()))
    with staging.loading:
        thread.start()
        assert snapshots == []
        with torch.no_grad():
            staging.tensors.parameters[0].fill_(2.0)
    thread.join()
    assert snapshots == [2.0]


def test_error_in_a_slots_thread_is_raised_in_a_later_step_and_in_all_after_it(server: FakeServer, loop: Loop) -> None:
    loop.wait()
    server.told(("exchange", refuse("PERMISSION_DENIED")))
    loop.step_and_wait()
    for _ in range(2):
        with pytest.raises(Refused, match="PERMISSION_DENIED: as scripted"):
            loop.step()


def test_worker_that_was_replaced_finds_out_in_a_step(server: FakeServer, loop: Loop) -> None:
    loop.wait()
    server.told(("exchange", refuse("FAILED_PRECONDITION", Reason.REPLACED)))
    loop.step_and_wait()
    with pytest.raises(Refused, match="a newer process has joined"):
        loop.step()


def test_step_that_is_interrupted_while_it_waits_loses_the_next_gradient_and_no_more(
    server: FakeServer, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges: InFlight = loop.exchanges
    real = exchanges._done

    class Interrupted:
        def get(self) -> Any:
            exchanges._done = real
            raise KeyboardInterrupt

    exchanges._done = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        loop.step(3.0)
    loop.step(5.0)  # there is no ticket for it
    loop.step()
    loop.step()
    loop.optimizer.close()
    gradients = [gradient.item() for gradient in server.gradients]
    assert len(gradients) == 3
    assert 6.0 in gradients
    assert loop.pushed[1] == (None, 10.0)
    assert 10.0 not in gradients


# The end.


def test_gradients_in_flight_are_delivered_before_the_worker_leaves(server: FakeServer) -> None:
    loop, closing = Loop(server.address), threading.Event()
    server.told(("received", held(closing)))
    loop.step()
    loop.exchanges.settle = closing_first(loop.exchanges.settle, closing)
    loop.optimizer.close()
    loop.optimizer.close()
    assert (len(server.gradients), loop.optimizer.counted) == (1, 1)
    assert server.asked[-1] == "leave"


def closing_first(settle: Callable[[float], None], closing: threading.Event) -> Callable[[float], None]:
    def told(seconds: float) -> None:
        closing.set()
        settle(seconds)

    return told


def test_gradient_that_does_not_arrive_holds_nobody_up(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leaving, "SETTLE_SECONDS", 0.05)
    loop, over = Loop(server.address), threading.Event()
    server.told(("received", held(over)))
    loop.step()
    with caplog.at_level(logging.INFO):
        loop.optimizer.close()
    over.set()
    assert (loop.optimizer.counted, loop.optimizer.under_way) == (0, 0)
    assert "what became of a gradient in flight is not known" in caplog.text
    assert names_of_threads() == []


def test_step_after_the_end_is_refused_instead_of_waiting(server: FakeServer, loop: Loop) -> None:
    loop.step()
    loop.optimizer.close()
    for _ in range(2):
        with pytest.raises(ClientClosed, match="has left the run"):
            loop.step()


def test_forgetting_the_optimizer_leaves_the_run_and_ends_the_threads(server: FakeServer) -> None:
    loop = Loop(server.address)
    loop.step()
    loop.step()
    del loop
    gc.collect()
    assert server.asked[-1] == "leave"
    assert server.iteration == 2
    assert names_of_threads() == []


PROGRAM = """
import sys, torch
from ormo_worker import RemoteOptimizer
model = torch.nn.Linear(1, 1, bias=False)
optimizer = RemoteOptimizer(model, sys.argv[1], in_flight=2)
for _ in range(3):
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
"""


def test_program_that_just_ends_delivers_its_gradients_and_leaves(server: FakeServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, server.address], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert server.iteration == 3
    assert server.asked[-1] == "leave"


# What is told of it.


def test_stages_and_waiting_are_timed_for_each_step(server: FakeServer) -> None:
    loop = Loop(server.address)
    loop.wait()
    for _ in range(3):
        loop.step()
    registry = loop.optimizer._client._connection.observer.registry  # type: ignore[attr-defined]
    loop.optimizer.close()
    counts = {
        stage: registry.get_sample_value("ormo_worker_step_seconds_count", {"stage": stage})
        for stage in ("compute", "push", "wait", "pull")
    }
    assert counts == {"compute": 3, "push": 3, "wait": 5, "pull": 5}  # two slots began without a gradient
    assert registry.get_sample_value("ormo_worker_blocked_seconds_count") == 3
    assert registry.get_sample_value("ormo_worker_steps_total", {"outcome": "applied"}) == 3


def test_waiting_for_an_answer_is_not_computing(server: FakeServer, loop: Loop) -> None:
    for _ in range(4):
        loop.step()
    loop.optimizer.close()
    registry = loop.optimizer._client._connection.observer.registry  # type: ignore[attr-defined]
    assert sum(announced.compute_seconds for announced in server.announced) == pytest.approx(
        registry.get_sample_value("ormo_worker_step_seconds_sum", {"stage": "compute"})
    )


class CopiesUntil(Copies):
    """As from a device that is done at that time."""

    def __init__(self, at: float) -> None:
        self._at = at

    def wait(self) -> float:
        return self._at


def test_time_in_which_a_device_was_still_at_the_gradient_before_counts_once() -> None:
    payload = Staging(line()).payload(FLOAT32, with_buffers=False)
    first, second = CopiesUntil(14.0), CopiesUntil(17.0)
    before, after = Gathered(payload, first, 1, 0.5, 10.0), Gathered(payload, second, 1, None, 11.0, first)
    assert [each.wait().compute_seconds for each in (before, after, before)] == [4.0, 3.0, 4.0]
    assert [each.wait().loss for each in (before, after)] == [0.5, None]


@pytest.mark.parametrize(
    ("in_flight", "threads", "mirrors"), [(1, {"MainThread"}, [0]), (2, {"ormo-slot-0", "ormo-slot-1"}, [0, 1])]
)
def test_slots_thread_waits_for_the_copy_from_the_device_and_the_training_thread_does_not(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, in_flight: int, threads: set[str], mirrors: list[int]
) -> None:
    streams = LateStreams(ahead="compute")
    streams.serve(monkeypatch)
    with streams.queueing():
        loop = Loop(server.address, in_flight)
        loop.wait()
        for _ in range(6):
            loop.step_and_wait()
        loop.optimizer.close()
    weights = [2.0]
    for gradient in server.gradients:
        weights.append(weights[-1] - LEARNING_RATE * gradient.item())
    tickets = [announced.ticket.iteration for announced in server.announced]
    assert [gradient.item() for gradient in server.gradients] == [weights[iteration] for iteration in tickets]
    waited = {
        name: {thread for event in streams.events if event.stream is stream for thread in event.waited_for_in}
        for name, stream in (("outward", streams.outward), ("inward", streams.inward))
    }
    assert waited == {"outward": threads, "inward": {"MainThread"}}
    assert [number for _, number in loop.optimizer._staging._mirrors] == mirrors


def test_each_gradient_knows_the_copies_of_the_one_before(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Gathered] = []
    swap = loop.exchanges.swap
    monkeypatch.setattr(loop.exchanges, "swap", lambda gathered: (given.append(gathered), swap(gathered))[1])
    for _ in range(3):
        loop.step()
    assert [gathered.before for gathered in given] == [None, given[0].copies, given[1].copies]


# Options.


@pytest.mark.parametrize("in_flight", [0, -1, MAX_SLOTS + 1])
def test_numbers_that_make_no_sense_are_an_error_before_the_server_is_asked(server: FakeServer, in_flight: int) -> None:
    with pytest.raises(OptionRefused, match=f"in_flight is {in_flight}: expected a whole number from 1 to 16"):
        Loop(server.address, in_flight)
    assert server.asked == []


def test_local_run_starts_its_server_with_as_many_slots(tmp_path: Path) -> None:
    for in_flight, slots in ((1, "2"), (2, "2"), (5, "5")):
        cluster = Cluster(LocalSettings(in_flight=in_flight, directory=tmp_path))
        server, worker = cluster._server_arguments(), cluster._worker_arguments(0, 1.0)
        assert server[server.index("--slots-per-worker") + 1] == slots
        assert worker[worker.index("--in-flight") + 1] == str(in_flight)
    assert RunSettings().in_flight == LocalSettings().in_flight == 1
