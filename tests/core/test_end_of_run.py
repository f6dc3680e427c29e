"""After the set number of gradients or samples nothing moves, and everybody is told."""

import dataclasses

import pytest
import torch

from core.driving import Driver, driver_of, fingerprint, run_of
from ormo_server.core.errors import Finished, NotAMember
from ormo_server.core.inputs import Gradient, Push


def finished_run() -> Driver:
    """Over after 2 gradients, of a; b still holds a ticket."""
    driver = driver_of(run_of(stop_after_gradients=2), "a", "b")
    driver.request("a")
    driver.request("b")
    driver.exchange("a", 1.0)
    driver.push("a", 1.0, samples=8)
    return driver


def test_a_run_ends_at_its_number_of_gradients() -> None:
    driver = driver_of(run_of(stop_after_gradients=3), "a")
    ends = []
    for _ in range(3):
        driver.request("a")
        driver.push("a", 1.0)
        ends.append(driver.machine.state.finished)
    assert ends == [False, False, True]


def test_a_run_ends_when_so_many_samples_are_counted_or_more() -> None:
    driver = driver_of(run_of(stop_after_samples=10), "a")
    ends = []
    for samples in (4, 5, 4):
        driver.request("a")
        driver.push("a", 1.0, samples=samples)
        ends.append((driver.machine.state.samples, driver.machine.state.finished))
    assert ends == [(4, False), (9, False), (13, True)]


def test_discarded_gradients_bring_the_end_no_nearer() -> None:
    driver = driver_of(run_of(stop_after_gradients=2, stop_after_samples=2, discard_delay=1), "a", "b")
    driver.request("a")
    driver.request("b")
    driver.push("a", 1.0, samples=1)
    assert driver.push("b", 1.0, samples=100).discarded
    assert not driver.machine.state.finished


def test_a_run_without_a_number_does_not_end() -> None:
    driver = driver_of(run_of(), "a")
    driver.request("a")
    for _ in range(50):
        driver.exchange("a", 1.0)
    assert not driver.machine.state.finished


def test_at_the_end_all_tickets_are_void_and_pushes_are_refused() -> None:
    driver = finished_run()
    before = fingerprint(driver.machine)
    assert not driver.machine.state.tickets
    with pytest.raises(Finished, match="the run is over after 2 gradients and 8 samples"):
        driver.push("b", 1.0)
    assert fingerprint(driver.machine) == before


def test_at_the_end_the_last_results_are_still_repeated() -> None:
    driver = finished_run()
    first = driver.places["a", 0].result
    assert first is not None
    assert first.iteration == 2
    again = driver.push("a", 1.0, number=first.request, ticket=(0, 3))
    assert again == dataclasses.replace(first, repeated=True)


def test_at_the_end_a_refused_request_does_not_confirm_the_kept_result() -> None:
    driver = finished_run()
    with pytest.raises(Finished):
        driver.request("a")
    assert driver.push("a", 1.0, number=driver.places["a", 0].request, ticket=(0, 3)).repeated


def test_at_the_end_joins_and_requests_are_refused() -> None:
    driver = finished_run()
    before = fingerprint(driver.machine)
    with pytest.raises(Finished):
        driver.join("c")
    with pytest.raises(Finished):
        driver.join("a", incarnation=2)
    with pytest.raises(Finished):
        driver.request("b")
    assert fingerprint(driver.machine) == before


def test_at_the_end_members_may_leave_and_strangers_are_strangers() -> None:
    driver = finished_run()
    driver.leave("a")
    assert list(driver.machine.state.members) == ["b"]
    with pytest.raises(NotAMember):
        driver.machine.step(Push(0.0, "a", 1, 0, 9, 1, 0), Gradient(torch.ones(1)))


def test_at_the_end_those_who_wait_are_released_at_once() -> None:
    driver = driver_of(run_of(scheduler="synchronous", min_workers=3, stop_after_gradients=2), *"abc")
    for worker in "abc":
        driver.request(worker)
    driver.exchange("a", 1.0)
    epoch, number = driver.ticket("b")
    effects = driver.machine.step(Push(0.0, *driver.requester("b"), number, epoch), Gradient(torch.ones(1)))
    (event,) = effects.released
    assert not effects.granted
    assert (event.slot, type(event.error)) == (("a", 0), Finished)
    state = driver.machine.state
    assert (state.waiting, state.tickets, state.round_params) == ({}, {}, None)
