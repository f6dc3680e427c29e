"""The memory that a run needs, by hand: vectors of 1000 numbers are 4000 bytes."""

import pytest
import torch

from core.driving import Driver, driver_of, run_of
from ormo_server.core import snapshot
from ormo_server.core.effects import Effects
from ormo_server.core.inputs import Gradient, Input
from ormo_server.core.method import Run, memory_need
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.schedulers import SCHEDULERS


@pytest.mark.parametrize(
    ("rule", "scheduler", "slots", "vectors"),
    [
        ("sgd", "asynchronous", 1, 1),  # w
        ("ormo", "asynchronous", 1, 2),  # w, u
        ("ormo", "asynchronous", 8, 2),
        ("ormo-vanilla", "asynchronous", 8, 2),
        ("ormo-nesterov", "asynchronous", 8, 2),
        ("naive", "asynchronous", 8, 2),
        ("smega2", "asynchronous", 8, 3),  # w, v, G
        ("naive-nesterov", "asynchronous", 8, 2),
        ("delayed-nesterov", "asynchronous", 8, 3),  # w, m, B
        ("fadas", "asynchronous", 8, 5),  # w, m, v, v̂, B
        ("shifted", "asynchronous", 8, 9),  # w, a u for each slot
        ("dc", "asynchronous", 8, 9),  # w, what was sent to each slot
        ("ormo", "bounded-staleness", 8, 2),
        ("sgd", "synchronous", 1, 2),  # w, the round's opening
        ("ormo", "synchronous", 3, 3),
        ("shifted", "synchronous", 3, 5),
    ],
)
def test_need_is_the_state_one_buffer_for_each_slot_and_the_copy_for_the_checkpoint(
    rule: str, scheduler: str, slots: int, vectors: int
) -> None:
    got = memory_need(_run(rule, scheduler), elements=1000, slots=slots)
    assert (got.state_bytes, got.exchange_bytes, got.checkpoint_bytes) == (4000 * vectors, 4000 * slots, 4000 * vectors)
    assert got.total_bytes == 4000 * (2 * vectors + slots)


def test_buffers_are_held_once_sent_with_each_slots_gradient_and_copied_for_the_checkpoint() -> None:
    got, without = (memory_need(run_of(), elements=1000, slots=8, buffer_bytes=extra) for extra in (24, 0))
    assert got.state_bytes == without.state_bytes + 24
    assert got.exchange_bytes == without.exchange_bytes + 8 * 24
    assert got.checkpoint_bytes == without.checkpoint_bytes + 24


@pytest.mark.parametrize(
    ("elements", "scales", "buffer_bytes", "expected"),
    [
        (1000, 1, 0, 4000),  # float32, which a worker may send: 3004 in int8 and bfloat16
        (1000, 1, 1500, 3000 + 4 + 2 * 1500),  # a buffer of either dtype has the model's
        (1000, 1000, 0, 7000),  # tensors of one number each
    ],
)
def test_local_steps_may_take_two_buffers_for_each_slot(
    elements: int, scales: int, buffer_bytes: int, expected: int
) -> None:
    got, without = (memory_need(run_of(local_steps=h), elements, 8, buffer_bytes, scales) for h in (16, 0))
    assert got.exchange_bytes == 8 * expected
    assert without.exchange_bytes == 8 * (4 * elements + buffer_bytes)


def _run(rule: str, scheduler: str) -> Run:
    bound = 3 if scheduler == "bounded-staleness" else None
    return run_of(rule, scheduler, staleness_bound=bound)


def all_push(driver: Driver) -> None:
    """Every slot has pushed at least once; under a bound or in rounds that takes some waiting."""
    for key in [*driver.places] * 3:
        if driver.places[key].granted is not None:
            driver.push(key[0], 1.0, key[1])
        if key not in driver.machine.state.waiting:
            driver.request(*key)


def bytes_held(driver: Driver) -> int:
    tensors = snapshot.take(driver.machine).tensors
    return sum(tensor.nbytes for name, tensor in tensors.items() if "buffers" not in name)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_busy_run_holds_what_was_stated_for_its_live_slots_and_never_more(rule: str, scheduler: str) -> None:
    slots = 1 if scheduler == "synchronous" else 2
    driver = driver_of(_run(rule, scheduler), "a", "b", "c", size=1000, slots=slots)
    held, stated = [], []

    step = driver.machine.step

    def note(given: Input, gradient: Gradient | None = None) -> Effects:
        effects = step(given, gradient)
        held.append(bytes_held(driver))
        stated.append(memory_need(driver.machine.run, 1000, driver.machine.state.live_slots).state_bytes)
        return effects

    driver.machine.step = note  # type: ignore[method-assign]
    all_push(driver)
    assert all(one <= other for one, other in zip(held, stated, strict=True))
    assert max(held) == stated[-1]
    driver.join("b", slots, incarnation=2)
    driver.leave("a")
    all_push(driver)
    assert all(one <= other for one, other in zip(held, stated, strict=True))
    assert len(driver.machine.state.rule.vectors) == (
        len(UPDATE_RULES[rule].vectors_of_run) + UPDATE_RULES[rule].vectors_per_slot * 2 * slots
    )
    assert all(vector.dtype == torch.float32 for vector in driver.machine.state.rule.vectors.values())
