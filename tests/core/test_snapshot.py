"""A state goes to plain data and back, and the run goes on as if nothing had been."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings

from core.driving import Driver, driver_of, fingerprint, run_of
from core.scripts import START, Command, carry_out, runs, stories
from ormo_server.core import snapshot
from ormo_server.core.errors import Replaced, SettingsError, TicketUnknown
from ormo_server.core.inputs import Join, Request
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.snapshot import Snapshot
from ormo_server.core.state import Slot


def through_json(taken: Snapshot) -> Snapshot:
    return Snapshot(taken.tensors, json.loads(json.dumps(taken.fields)))


def restarted(driver: Driver, *, keep_tickets: bool, epoch: int | None = None, run: Run | None = None) -> Driver:
    """The driver of a machine restored from what would be on disk; workers know what they knew."""
    other = copy.copy(driver)
    other.machine = snapshot.restore(
        run or driver.machine.run,
        through_json(snapshot.take(driver.machine)),
        epoch=driver.machine.state.epoch if epoch is None else epoch,
        keep_tickets=keep_tickets,
    )
    other.incarnations, other.places = dict(driver.incarnations), copy.deepcopy(driver.places)
    other.granted, other.applied = [], []
    return other


def ask_again(driver: Driver, waiting: list[tuple[str, int]]) -> None:
    """Streams do not outlive their server: who waited asks again, with the same number."""
    for key in waiting:
        driver.request(*key, number=driver.places[key].request)


@settings(max_examples=100, deadline=None)
@given(run=runs(UPDATE_RULES), before=stories("tune"), after=stories("tune"))
def test_a_restored_run_continues_bit_for_bit_like_the_uninterrupted_one(
    run: Run, before: list[Command], after: list[Command]
) -> None:
    driver = Driver(StateMachine.fresh(run, START.clone(), torch.zeros(2), torch.zeros(1, dtype=torch.int64)))
    for command in before:
        carry_out(driver, command)
    other, waiting = restarted(driver, keep_tickets=True), list(driver.machine.state.waiting)
    for each in (driver, other):
        ask_again(each, waiting)
    assert fingerprint(other.machine) == fingerprint(driver.machine)
    for command in after[4:]:  # without its joins
        for each in (driver, other):
            carry_out(each, command)
        assert fingerprint(other.machine) == fingerprint(driver.machine)


def busy_run(**settings: object) -> Driver:
    """a has a kept result, b holds a ticket, c was replaced; there are buffers."""
    floats, ints = torch.tensor([0.5]), torch.tensor([3])
    machine = StateMachine.fresh(run_of(**settings), torch.zeros(2), floats, ints, epoch=2**64 - 1)
    driver = Driver(machine)
    for worker in "abc":
        driver.join(worker)
        driver.request(worker)
    driver.join("c", incarnation=2)
    driver.exchange("b", 1.0)
    driver.push("a", 1.0, samples=3)
    return driver


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_snapshot_is_a_copy_that_the_running_machine_does_not_change(rule: str) -> None:
    driver = busy_run(rule=rule)
    taken = snapshot.take(driver.machine)
    before = copy.deepcopy((taken.fields, {name: tensor.tolist() for name, tensor in taken.tensors.items()}))
    driver.exchange("b", 5.0)
    driver.leave("a")
    assert (taken.fields, {name: tensor.tolist() for name, tensor in taken.tensors.items()}) == before


@pytest.mark.parametrize(
    ("rule", "vectors"),
    [
        ("sgd", set()),
        ("ormo", {"rule.momentum"}),
        ("smega2", {"rule.momentum", "rule.gathered"}),
        ("shifted", {"rule.momentum/a/0", "rule.momentum/b/0"}),
        ("dc", {"rule.sent/a/0", "rule.sent/b/0"}),
    ],
)
def test_a_snapshots_tensors_have_the_names_that_a_checkpoint_documents(rule: str, vectors: set[str]) -> None:
    assert set(snapshot.take(busy_run(rule=rule).machine).tensors) == {
        *("params", "float_buffers", "int_buffers"),
        *vectors,
    }


def test_fields_survive_json() -> None:
    driver = busy_run()
    taken = snapshot.take(driver.machine)
    back = snapshot.restore(driver.machine.run, through_json(taken), epoch=2**64 - 1, keep_tickets=True)
    assert fingerprint(back) == fingerprint(driver.machine)
    assert back.state.members == driver.machine.state.members
    assert back.state.tickets == driver.machine.state.tickets
    assert back.state.replaced == driver.machine.state.replaced


def test_with_tickets_kept_a_ticket_of_the_old_epoch_is_redeemed_and_new_ones_are_of_the_new() -> None:
    other = restarted(busy_run(), keep_tickets=True, epoch=7)
    result = other.push("b", 1.0)
    assert (result.epoch, result.iteration) == (7, 3)
    other.request("b")
    assert other.ticket("b")[0] == 7


def test_a_result_says_that_buffers_were_kept_only_where_they_were_which_older_servers_do_not_know() -> None:
    driver = busy_run()
    driver.push("b", 1.0, float_buffers=torch.tensor([torch.nan]), int_buffers=torch.tensor([4]))
    taken = through_json(snapshot.take(driver.machine))
    of_a, of_b = (member["slots"][0]["result"] for member in taken.fields["members"][:2])
    assert ("buffers_kept" in of_a, of_b["buffers_kept"]) == (False, True)
    back = snapshot.restore(driver.machine.run, taken, epoch=2**64 - 1, keep_tickets=True)
    assert back.state.members == driver.machine.state.members


def test_with_tickets_kept_a_result_is_still_repeated() -> None:
    driver = busy_run()
    other = restarted(driver, keep_tickets=True, epoch=7)
    used = driver.machine.state.slot(("a", 0)).redeemed
    again = other.push("a", 1.0, number=driver.places["a", 0].request, ticket=used)
    assert again.repeated
    assert (again.epoch, again.iteration) == (2**64 - 1, 2)


def test_without_tickets_all_are_void_results_are_dropped_and_members_stay() -> None:
    driver = busy_run()
    other = restarted(driver, keep_tickets=False, epoch=7)
    state = other.machine.state
    assert state.tickets == {}
    assert all(slot.ticket is None and slot.result is None for m in state.members.values() for slot in m.slots)
    assert list(state.members) == ["a", "b", "c"]
    assert [member.data_seed for member in state.members.values()] == [
        member.data_seed for member in driver.machine.state.members.values()
    ]
    with pytest.raises(TicketUnknown):
        other.push("b", 1.0)
    assert other.request("b") is not None


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_without_tickets_parameters_buffers_counters_and_all_of_the_rule_stay(rule: str) -> None:
    driver = busy_run(rule=rule)
    old, new = driver.machine.state, restarted(driver, keep_tickets=False, epoch=7).machine.state
    for name in ("params", "float_buffers", "int_buffers"):
        assert torch.equal(getattr(old, name), getattr(new, name))
    assert {name: vector.tolist() for name, vector in old.rule.vectors.items()} == {
        name: vector.tolist() for name, vector in new.rule.vectors.items()
    }
    assert old.rule.counters == new.rule.counters
    counters = ("iteration", "samples", "newest_bucket", "issue", "filled", "next_ticket", "joins", "learning_rate")
    assert [getattr(new, name) for name in counters] == [getattr(old, name) for name in counters]


def test_a_replaced_process_is_refused_after_a_restart_too() -> None:
    other = restarted(busy_run(), keep_tickets=False, epoch=7)
    with pytest.raises(Replaced):
        other.take(Request(0.0, "c", 1, 0, 5))


def half_a_round() -> Driver:
    """Round 1 is open: a has pushed, b has a ticket that was not delivered yet."""
    driver = driver_of(run_of(scheduler="synchronous", min_workers=2), "a", "b")
    for worker in "ab":
        driver.request(worker)
        driver.push(worker, 1.0) if worker == "a" else None
    driver.push("b", 1.0)
    driver.request("a")
    driver.push("a", 4.0)
    return driver


def test_with_tickets_kept_an_undelivered_ticket_still_carries_its_rounds_parameters() -> None:
    driver = half_a_round()
    other = restarted(driver, keep_tickets=True)
    assert other.request("b") is not None
    assert other.places["b", 0].params == -2.0
    assert driver.machine.state.params != -2.0


def test_without_tickets_the_round_is_closed_and_the_next_has_all_members_and_the_next_bucket() -> None:
    other = restarted(half_a_round(), keep_tickets=False, epoch=7)
    assert other.machine.state.round_params is None
    granted = other.request("a")
    assert granted is not None
    assert (granted.ticket.bucket, granted.ticket.iteration) == (2, 3)
    assert {ticket.slot[0] for ticket in other.machine.state.tickets.values()} == {"a", "b"}


def test_after_a_restore_min_workers_do_not_matter() -> None:
    driver = driver_of(run_of(min_workers=3), "a")
    assert driver.request("a") is None
    assert restarted(driver, keep_tickets=False).request("a") is not None


def test_another_update_rule_than_the_snapshots_is_refused() -> None:
    taken = snapshot.take(busy_run().machine)
    with pytest.raises(SettingsError, match="written with the update rule 'ormo' and the settings say 'sgd'"):
        snapshot.restore(run_of("sgd"), taken, epoch=1, keep_tickets=False)


def test_a_finished_run_stays_finished_and_repeats_its_results() -> None:
    driver = driver_of(run_of(stop_after_gradients=1), "a")
    driver.request("a")
    driver.push("a", 1.0)
    other = restarted(driver, keep_tickets=True)
    assert other.machine.state.finished
    assert other.push("a", 1.0, number=driver.places["a", 0].request, ticket=(0, 1)).repeated


def test_another_scheduler_goes_on_from_the_same_parameters_with_workers_that_join_again() -> None:
    driver = driver_of(run_of(), "a", "b", slots=2)
    driver.request("a", 1)
    driver.push("a", 1.0, 1)
    other = restarted(driver, keep_tickets=True, run=run_of(scheduler="synchronous"))
    state = other.machine.state
    assert (state.members, state.tickets, state.iteration) == ({}, {}, 1)
    assert torch.equal(state.params, driver.machine.state.params)
    other.incarnations.clear()
    other.join("a")
    assert other.request("a").ticket.bucket == 1


@pytest.mark.parametrize(("bound", "kept"), [(4, True), (9, True), (3, False)])
def test_tickets_that_may_come_back_too_late_for_a_smaller_staleness_bound_are_void(bound: int, kept: bool) -> None:
    before, after = (run_of(scheduler="bounded-staleness", staleness_bound=s) for s in (4, bound))
    driver = driver_of(before, "a", "b")
    driver.request("b")
    driver.request("a")
    other = restarted(driver, keep_tickets=True, run=after)
    assert bool(other.machine.state.tickets) is kept


def test_asynchronous_buckets_go_on_after_the_rounds_of_a_synchronous_run() -> None:
    driver = driver_of(run_of(scheduler="synchronous"), "a")
    for _ in range(3):
        driver.request("a")
        driver.push("a", 1.0)
    assert driver.machine.state.newest_bucket == 2
    other = restarted(driver, keep_tickets=True, run=run_of())
    other.join("a")
    assert other.request("a").ticket.bucket == 3


def test_a_finished_run_goes_on_when_its_end_is_moved_and_ends_when_it_is_moved_back() -> None:
    driver = driver_of(run_of(stop_after_gradients=1), "a")
    driver.request("a")
    driver.push("a", 1.0)
    assert driver.machine.state.finished
    longer = restarted(driver, keep_tickets=True, run=run_of(stop_after_gradients=2))
    assert not longer.machine.state.finished
    assert longer.request("a") is not None
    shorter = restarted(longer, keep_tickets=True, run=run_of(stop_after_gradients=1))
    assert (shorter.machine.state.finished, shorter.machine.state.tickets) == (True, {})


def test_who_was_taken_for_dead_is_remembered_over_a_restart() -> None:
    driver = driver_of(run_of(), "a")
    driver.leave("a")
    other = restarted(driver, keep_tickets=True)
    other.join("a", incarnation=2)
    with pytest.raises(Replaced):
        other.take(Join(0.0, "a", 1, 1))


@pytest.mark.parametrize("keep_tickets", [True, False])
def test_who_was_taken_for_dead_has_its_result_over_a_restart_if_tickets_are_kept(keep_tickets: bool) -> None:
    driver = busy_run()
    result = driver.push("b", 1.0)
    ticket = driver.granted[-1].ticket.key
    driver.leave("b")
    other = restarted(driver, keep_tickets=keep_tickets, epoch=7)
    other.join("b")
    if keep_tickets:
        assert other.push("b", 1.0, number=result.request, ticket=ticket).repeated
    else:
        with pytest.raises(TicketUnknown):
            other.push("b", 1.0, number=result.request, ticket=ticket)


def test_of_who_has_gone_earlier_versions_have_written_the_incarnation_alone() -> None:
    driver = driver_of(run_of(), "a")
    driver.leave("a")
    taken = snapshot.take(driver.machine)
    taken.fields["departed"] = {"a": 1}
    machine = snapshot.restore(run_of(), taken, epoch=7, keep_tickets=True)
    member = machine.step(Join(0.0, "a", 1, 1)).member
    assert member is not None
    assert member.slots == [Slot()]
