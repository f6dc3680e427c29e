"""Several gradients in flight, with the real server in this process."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.driving import Applied, told_by
from core.reference import closed_form, rounding
from ormo_server.core.inputs import Push
from ormo_server.service.server import Server
from ormo_server.trace import Recorded
from ormo_worker.errors import Refused
from ormo_worker.pytorch import leaving
from service.wire import eventually, served
from worker.pytorch.loops import PATIENT_SECONDS, Loop


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    """Of the worker; the server's pool ends when it may."""
    yield
    Loop.close_all()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ormo-slot")] == []


def inputs(server: Server) -> list[Recorded]:
    """Of a server that has its model: those that take effect from now on."""
    with server.host.engine.inspect() as machine:
        return told_by(machine)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_state_of_the_server_is_the_closed_form_for_the_delays_that_came(tmp_path: Path, in_flight: int) -> None:
    with served(tmp_path, slots_per_worker=4, learning_rate=0.05) as server:
        loop = Loop(server.address, in_flight)
        told = inputs(server)
        loop.wait()
        for _ in range(40):
            loop.step()
        loop.optimizer.close()
        of_slot = {slot: iter([value for who, value in loop.pushed if who == slot]) for slot in range(in_flight)}
        applied = [
            Applied(
                torch.tensor([next(of_slot[push.slot])], dtype=torch.float64),
                redeemed.step_size,
                redeemed.bucket,
                redeemed.iteration,
                redeemed.delay,
                in_flight,
            )
            for push, redeemed in told
            if isinstance(push, Push) and redeemed is not None
        ]
        start = torch.tensor([2.0])
        params, momentum = closed_form(start, applied, 0.5)
        with server.host.engine.inspect() as machine:
            allowed = rounding(start, applied, 0.5)
            assert len(applied) == 40
            assert (machine.state.params.double() - params).abs() <= allowed
            assert (machine.state.rule.vectors["momentum"].double() - momentum).abs() <= allowed
    assert (max(one.delay for one in applied) == 0) == (in_flight == 1)


def test_slots_that_can_never_both_hold_a_ticket_do_not_wait_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "SETTLE_SECONDS", 0.1)  # for a ticket that is never handed out
    bounds = {"scheduler": "bounded-staleness", "staleness_bound": 0}
    with served(tmp_path, **bounds) as server:
        loop = Loop(server.address)
        told = inputs(server)
        for _ in range(10):
            loop.step()
        loop.optimizer.close()
        assert [each.redeemed.delay for each in told if each.redeemed is not None] == [0] * 10


def test_slot_that_waits_for_its_first_ticket_holds_nobody_up_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "SETTLE_SECONDS", 1000.0)  # longer than a test may take
    with served(tmp_path, scheduler="bounded-staleness", staleness_bound=0) as server:
        loop = Loop(server.address)
        eventually(lambda: server.host.engine.view().slots_waiting == 1)
        loop.optimizer.close()


def test_workers_with_several_slots_share_a_bound_on_staleness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "SETTLE_SECONDS", 0.5)
    with served(tmp_path, scheduler="bounded-staleness", staleness_bound=1, min_workers=2) as server:
        threads = [threading.Thread(target=train, args=(server.address,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: server.host.has_model)
        told = inputs(server)
        for thread in threads:
            thread.join(PATIENT_SECONDS)
        redeemed = [each.redeemed for each in told if each.redeemed is not None]
        assert len(redeemed) == 40
        assert max(each.delay for each in redeemed) == 1


def train(address: str) -> None:
    loop = Loop(address)
    for _ in range(20):
        loop.step()
    loop.optimizer.close()


def test_training_goes_on_in_all_slots_when_the_server_is_restarted(tmp_path: Path) -> None:
    with served(tmp_path, learning_rate=0.01) as server:
        loop = Loop(server.address)
        for _ in range(5):
            loop.step()
        address = server.address
    with served(tmp_path, learning_rate=0.01, listen=address):
        for _ in range(10):
            loop.step()
        loop.optimizer.close()
        assert loop.optimizer.counted + loop.optimizer.refusals.total() == 15
        assert loop.optimizer.counted >= 13


REFUSED = [
    ({}, 3, r"3 slots were asked for, and slots_per_worker is 2"),
    ({"method": "ssgdm"}, 2, r"2 slots were asked for: this run's scheduler serves 1 to 1"),
]


@pytest.mark.parametrize(("changes", "in_flight", "sentence"), REFUSED)
def test_more_slots_than_the_server_allows_are_an_error_that_names_the_option(
    tmp_path: Path, changes: dict[str, Any], in_flight: int, sentence: str
) -> None:
    with served(tmp_path, **changes) as server:
        with pytest.raises(Refused, match=sentence) as refused:
            Loop(server.address, in_flight)
        assert f"this worker asks for {in_flight} slots because of --in-flight" in str(refused.value)
        Loop(server.address, 1).optimizer.close()
