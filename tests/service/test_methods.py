"""Every method trains over the wire, lives on through a restart, and leaves a trace that replays to the same bits."""

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_protos.tensors import Payload
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Gradient, Push
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import PRESETS
from ormo_server.core.snapshot import Snapshot, take
from ormo_server.service.server import Server
from ormo_server.trace import Recorded, Segment, read_trace
from service.wire import SMALL, WireWorker, connected, payload, served

WORKERS, GRADIENTS_EACH = 3, 12
SIZE = SMALL.sizes["parameters"]
# Workers compute the gradient of half the squared distance to here.
TARGET = torch.linspace(-1.0, 1.0, SIZE)
METHODS: dict[str, dict[str, Any]] = {name: {"method": name} for name in PRESETS}
# So that a bucket is half full, and its counter above 0, when the server stops.
METHODS["smega2"]["bucket_size"] = 5
# Which of them the clock makes slower is chance, as the order is in which they come.
METHODS["by speed"] = {"method": "local-ormo", "local_steps": 8, "local_steps_by_speed": True}
METHODS["bounded-staleness"] = {"scheduler": "bounded-staleness", "staleness_bound": WORKERS - 1}


class TickingClock:
    """A run's clock that moves when it is looked at, so that no hiccup of this machine decides how far a step goes."""

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._start, self._looks = start_seconds, itertools.count()

    def __call__(self) -> float:
        return self._start + next(self._looks) / 1000


@pytest.fixture(autouse=True)
def _time_is_virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ormo_server.service.run.RunClock", TickingClock)


def gradient_at(params: torch.Tensor) -> Payload:
    made = payload(SMALL, 0.0)
    made.parameters.copy_(params - TARGET)
    return made


def train(worker: WireWorker) -> None:
    stream = worker.open()
    stream.begin(None)
    stream.delivery()
    for left in reversed(range(GRADIENTS_EACH)):
        assert worker.ticket is not None
        steps = worker.ticket.local_steps
        stream.begin(gradient_at(worker.params), wants=left > 0, local_steps=steps)
        assert not stream.result().refusal
        if left:
            stream.delivery()
    stream.finish()


def trained_together(stub: ParameterServerStub, local_steps: int) -> list[WireWorker]:
    workers = [WireWorker(stub, f"w{number}", local_steps=local_steps) for number in range(WORKERS)]
    for worker in workers:
        worker.join()
    threads = [threading.Thread(target=train, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    return workers


def state_of(server: Server) -> Snapshot:
    return server.host.engine.snapshot()[0]


def assert_same_bits(got: Snapshot, expected: Snapshot, *, but: tuple[str, ...] = ()) -> None:
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    assert {k: v for k, v in got.fields.items() if k not in but} == {
        k: v for k, v in expected.fields.items() if k not in but
    }


def replayed(segment: Segment) -> Snapshot:
    """The state that the traced inputs lead to, with gradients computed anew."""
    start = segment.start
    machine = StateMachine.fresh(
        start.training().run(),
        torch.zeros(start.model.parameters),
        torch.zeros(SMALL.sizes["float_buffers"]),
        torch.zeros(SMALL.sizes["int_buffers"], dtype=torch.int64),
        epoch=start.epoch,
    )
    delivered: dict[SlotKey, torch.Tensor] = {}
    for entry in segment.inputs:
        assert isinstance(entry, Recorded)
        given, redeemed = entry
        gradient = Gradient(delivered[given.worker, given.slot] - TARGET) if isinstance(given, Push) else None
        effects = machine.step(given, gradient)
        assert effects.redeemed == redeemed
        assert not effects.released
        for granted in effects.granted:
            delivered[granted.slot] = torch.empty(SIZE)
            machine.write_delivery(granted, delivered[granted.slot])
    return take(machine)


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_survives_a_restart_bit_for_bit_and_its_trace_replays(tmp_path: Path, method: str) -> None:
    # K is 3, and the bucket's gradients are summed.
    changes = METHODS[method] | {"learning_rate": 0.1, "min_workers": WORKERS, "trace": tmp_path / "trace.jsonl"}
    with served(tmp_path, **changes) as server, connected(server) as stub:
        first, second, _ = trained_together(stub, changes.get("local_steps", 0))
        # Tickets in flight, and under the synchronous scheduler one that is not delivered yet.
        first.pull()
        second.pull()
        before = state_of(server)
        assert server.drain()
    with server.host.engine.settled() as seen:
        counted = before.fields["iteration"] + seen.discarded
    assert counted == WORKERS * GRADIENTS_EACH
    distance = (before.tensors["params"] - TARGET).norm() / TARGET.norm()
    assert distance < 0.5

    with served(tmp_path, **changes) as server, connected(server) as stub:
        assert_same_bits(state_of(server), before, but=("epoch",))
        first.stub = stub
        assert first.push(gradient_at(first.params)).iteration.number == before.fields["iteration"] + 1
        server.drain()

    fresh, restored = read_trace(tmp_path / "trace.jsonl")
    assert (fresh.start.fresh, restored.start.fresh) == (True, False)
    assert restored.start.iteration == before.fields["iteration"]
    assert_same_bits(replayed(fresh), before)
    assert [type(entry.input) for entry in restored.inputs] == [Push]
