"""Who is a member, who takes whose place, and who is turned away."""

import pytest
import torch

from core.driving import driver_of, fingerprint, run_of
from ormo_server.core import members
from ormo_server.core.errors import BadRequest, NotAMember, Replaced, TicketUnknown, TooManyWorkers
from ormo_server.core.inputs import Join, Leave, Request
from ormo_server.core.machine import StateMachine
from ormo_server.core.members import data_seed


def test_k_is_the_number_of_slots_of_the_live_workers_and_at_least_one() -> None:
    driver = driver_of(run_of())
    sizes = [driver.machine.bucket_size]
    driver.join("a", slots=2)
    sizes.append(driver.machine.bucket_size)
    driver.join("b", slots=3)
    sizes.append(driver.machine.bucket_size)
    driver.leave("a")
    sizes.append(driver.machine.bucket_size)
    assert sizes == [1, 2, 5, 3]


def test_a_fixed_k_stays() -> None:
    driver = driver_of(run_of(bucket_size=7), "a", "b")
    driver.leave("a")
    assert driver.machine.bucket_size == 7


def test_a_join_repeated_by_the_same_process_gets_the_same_answer_and_changes_nothing() -> None:
    driver = driver_of(run_of(), "a")
    driver.request("a")
    before = fingerprint(driver.machine)
    assert driver.join("a") is driver.machine.state.members["a"]
    assert fingerprint(driver.machine) == before


def test_a_join_repeated_with_other_slots_is_refused() -> None:
    driver = driver_of(run_of(), "a", slots=2)
    before = fingerprint(driver.machine)
    with pytest.raises(BadRequest, match="joined with 2 slots and now asks for 3: leave first"):
        driver.join("a", slots=3)
    assert fingerprint(driver.machine) == before


@pytest.mark.parametrize("slots", [0, -1, 17])
def test_slots_out_of_range_are_refused(slots: int) -> None:
    driver = driver_of(run_of())
    before = fingerprint(driver.machine)
    with pytest.raises(BadRequest, match="serves 1 to 16"):
        driver.join("a", slots=slots)
    assert fingerprint(driver.machine) == before


def test_a_new_process_of_the_same_id_replaces_the_old_one_at_once() -> None:
    driver = driver_of(run_of(max_workers=1), "a", slots=2)
    driver.request("a")
    old = driver.ticket("a")
    driver.join("a", slots=1, incarnation=2)
    state = driver.machine.state
    assert (len(state.members), state.tickets, driver.machine.bucket_size) == (1, {}, 1)
    with pytest.raises(TicketUnknown):
        driver.push("a", 1.0, ticket=old)


def test_a_replaced_process_is_remembered_and_refused_in_all_that_it_asks() -> None:
    driver = driver_of(run_of(), "a")
    driver.join("a", incarnation=2)
    for attempt in (
        lambda: driver.take(Join(0.0, "a", 1, 1)),
        lambda: driver.take(Leave(0.0, "a", 1)),
        lambda: driver.take(Request(0.0, "a", 1, 0, 1)),
    ):
        with pytest.raises(Replaced, match="give them different worker ids"):
            attempt()
    assert driver.machine.state.members["a"].incarnation == 2


def test_only_so_many_replaced_processes_are_remembered_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "PROCESSES_REMEMBERED", 2)
    driver = driver_of(run_of(), "a")
    for incarnation in range(2, 6):
        driver.join("a", incarnation=incarnation)
    assert list(driver.machine.state.replaced) == [("a", 3), ("a", 4)]


def test_a_process_that_was_taken_for_dead_can_not_throw_out_its_successor() -> None:
    driver = driver_of(run_of(), "a")
    driver.leave("a")
    driver.join("a", incarnation=2)
    with pytest.raises(Replaced):
        driver.take(Join(0.0, "a", 1, 1))
    assert driver.machine.state.members["a"].incarnation == 2


def test_a_worker_that_left_is_no_member_and_may_join_again() -> None:
    driver = driver_of(run_of(), "a")
    requester = driver.requester("a")
    driver.leave("a")
    with pytest.raises(NotAMember, match="'a' is not a member of this run: join first, or again"):
        driver.take(Request(0.0, *requester))
    driver.join("a")
    assert driver.request("a") is not None


def test_leaving_twice_or_without_having_joined_is_no_mistake_and_does_nothing() -> None:
    driver = driver_of(run_of(), "a", "b")
    driver.leave("a")
    before = fingerprint(driver.machine)
    assert not driver.take(Leave(0.0, "a", 1)).changed
    assert not driver.take(Leave(0.0, "b", 99)).changed
    assert fingerprint(driver.machine) == before


def test_a_leavers_tickets_are_void_and_others_keep_theirs() -> None:
    driver = driver_of(run_of(), "a", "b", slots=2)
    for worker in "ab":
        for slot in range(2):
            driver.request(worker, slot)
    driver.leave("a")
    assert {ticket.slot for ticket in driver.machine.state.tickets.values()} == {("b", 0), ("b", 1)}


def test_more_than_max_workers_are_refused_until_one_leaves() -> None:
    driver = driver_of(run_of(max_workers=2), "a", "b")
    before = fingerprint(driver.machine)
    with pytest.raises(TooManyWorkers, match="2 workers have joined and max_workers is 2") as caught:
        driver.join("c")
    assert caught.value.retry_seconds == 5.0
    assert fingerprint(driver.machine) == before
    driver.leave("a")
    assert driver.join("c").rank == 0


@pytest.mark.parametrize("scheduler", ["asynchronous", "synchronous"])
def test_no_ticket_before_min_workers_have_joined_and_then_for_all_who_wait(scheduler: str) -> None:
    driver = driver_of(run_of(scheduler=scheduler, min_workers=3), "a", "b")
    assert driver.request("a") is None
    assert driver.request("b") is None
    driver.join("c")
    assert [granted.slot for granted in driver.granted] == [("a", 0), ("b", 0)]
    assert driver.request("c") is not None


def test_once_started_a_run_goes_on_with_fewer_than_min_workers() -> None:
    driver = driver_of(run_of(min_workers=2), "a", "b")
    driver.leave("b")
    assert driver.request("a") is not None


def test_a_rank_is_the_smallest_that_is_free() -> None:
    driver = driver_of(run_of(), "a", "b", "c")
    driver.leave("b")
    driver.leave("a")
    assert (driver.join("d").rank, driver.join("e").rank, driver.join("f").rank) == (0, 1, 3)


def test_data_seeds_differ_for_every_join_and_every_epoch_and_every_run() -> None:
    seeds = []
    for run_seed, epoch in ((0, 1), (0, 2), (1, 1)):
        machine = StateMachine.fresh(run_of(seed=run_seed), torch.zeros(1), epoch=epoch)
        joined = [machine.step(Join(0.0, worker, number, 1)).member for number, worker in enumerate("abab")]
        seeds += [member.data_seed for member in joined if member is not None]
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_data_seed_is_a_function_of_run_seed_epoch_and_joins() -> None:
    machine = StateMachine.fresh(run_of(seed=5), torch.zeros(1), epoch=9)
    member = machine.step(Join(0.0, "a", 1, 1)).member
    assert member is not None
    assert member.data_seed == data_seed(5, 9, 1)
