"""How many local steps a ticket is for, which pushes a run takes, and what files say of both."""

import heapq
import json
from typing import Any

import pytest

from core.driving import Driver, driver_of, fingerprint, replay, rows, run_of, told_by
from ormo_server.core import snapshot
from ormo_server.core.errors import BadRequest, NotAMember
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run, memory_need
from ormo_server.core.pace import Pace, after_push, steps_for
from ormo_server.core.snapshot import Snapshot

H = 16


def local_run(**choices: Any) -> Run:
    return run_of("sgd", bucket="mean", **{"local_steps": H} | choices)


def by_speed(**choices: Any) -> Run:
    return local_run(local_steps_by_speed=True, **choices)


# The fourth push waited for its ticket until 12. The last one is another slot's: its ticket is older than the push
# before, from which its second runs.
PUSHES = """
    handed_out  pushed  made  steps  seconds
           0.0     2.0    16   16.0    2.0
           2.0     6.0    16   16.0    2.5
           6.0     8.0     8   14.0    2.375
          12.0    14.0     8   12.5    2.28125
           8.0    15.0    16   13.375  1.9609375
"""


def test_a_pace_follows_the_steps_and_the_time_of_each_push() -> None:
    pace = None
    for row in rows(PUSHES):
        pace = after_push(pace, int(row["made"]), row["handed_out"], row["pushed"])
        assert pace == Pace(row["steps"], row["seconds"], row["pushed"])
    assert pace is not None
    assert pace.steps_per_second == 13.375 / 1.9609375


# v_max is 8 steps a second.
SHARES = """
    most  speed  steps
      16    8.0     16
      16    4.0      8
      16    2.0      4
      16    2.2      4
      16    2.4      5
      16    1.0      2
      16    0.1      2
      12    0.1      2
       6    8.0      6
       6    1.0      1
       1    0.1      1
"""


def test_steps_go_by_the_share_of_the_fastest_s_speed_and_are_an_eighth_at_least() -> None:
    fastest = Pace(8.0, 1.0, 0.0)
    for row in rows(SHARES):
        mine = Pace(row["speed"], 1.0, 0.0)
        assert steps_for(int(row["most"]), mine, [mine, None, fastest]) == row["steps"]


def test_who_has_not_pushed_makes_all_steps() -> None:
    assert steps_for(H, None, [None, Pace(8.0, 1.0, 0.0)]) == H


def test_a_push_at_the_very_time_of_its_ticket_is_fast_and_no_division_by_zero() -> None:
    at_once = after_push(None, 1, 3.0, 3.0)
    assert steps_for(H, at_once, [at_once, Pace(8.0, 1.0, 0.0)]) == H


# In a run


def train(driver: Driver, seconds_per_step: dict[str, float], pushes: int) -> dict[str, list[int]]:
    """Let workers of these speeds push so often, all in all; returns what their tickets said, the first one apart."""
    driver.input_seconds, found = 0.0, {worker: [] for worker in seconds_per_step}
    due: list[tuple[float, str]] = []

    def start(worker: str) -> None:
        granted = driver.places[worker, 0].granted
        assert granted is not None
        heapq.heappush(due, (driver.now + granted.ticket.local_steps * seconds_per_step[worker], worker))

    for worker in seconds_per_step:
        if driver.places[worker, 0].granted is None:
            driver.request(worker)
        start(worker)
    for _ in range(pushes):
        driver.now, worker = heapq.heappop(due)
        driver.exchange(worker, 1.0)
        found[worker].append(driver.granted[-1].ticket.local_steps)
        start(worker)
    return found


def test_without_by_speed_every_ticket_is_for_all_steps() -> None:
    found = train(driver_of(local_run(), "a", "b"), {"a": 1.0, "b": 4.0}, 20)
    assert {steps for told in found.values() for steps in told} == {H}


def test_tickets_of_a_run_of_gradients_are_for_no_local_steps() -> None:
    driver = driver_of(run_of(), "a")
    driver.request("a")
    assert driver.granted[-1].ticket.local_steps == 0


def test_equally_fast_workers_make_all_steps() -> None:
    found = train(driver_of(by_speed(), *"abc"), {"a": 1.0, "b": 1.0, "c": 1.0}, 30)
    assert {steps for told in found.values() for steps in told} == {H}


def test_one_that_is_four_times_slower_makes_a_quarter_and_pushes_as_often() -> None:
    found = train(driver_of(by_speed(), *"abc"), {"a": 1.0, "b": 1.0, "c": 4.0}, 60)
    assert (set(found["a"]), set(found["b"]), set(found["c"])) == ({H}, {H}, {H // 4})
    assert len(found["c"]) in (18, 19)  # its first ticket was for all steps, and took as long as four of the others'


def test_one_that_becomes_slower_makes_fewer_by_and_by() -> None:
    driver = driver_of(by_speed(), "a", "b")
    train(driver, {"a": 1.0, "b": 1.0}, 10)
    told = train(driver, {"a": 1.0, "b": 8.0}, 120)["b"]
    assert told[0] < H
    assert told[-1] == H // 8
    assert told == sorted(told, reverse=True)


def test_once_the_fastest_has_left_the_others_make_all_steps() -> None:
    driver = driver_of(by_speed(), *"abc")
    found = train(driver, {"a": 1.0, "b": 4.0, "c": 4.0}, 40)
    assert (found["b"][-1], found["c"][-1]) == (H // 4, H // 4)
    driver.leave("a")
    for worker in "bc":
        driver.request(worker)
        assert driver.granted[-1].ticket.local_steps == H


def test_a_process_that_comes_back_is_measured_anew() -> None:
    driver = driver_of(by_speed(), "a", "b")
    train(driver, {"a": 1.0, "b": 4.0}, 20)
    driver.leave("b")
    driver.join("b")
    driver.request("b")
    assert driver.granted[-1].ticket.local_steps == H


def test_in_rounds_a_slow_worker_makes_fewer_too_as_its_waiting_does_not_count() -> None:
    driver = driver_of(by_speed(scheduler="synchronous", min_workers=2), "a", "b")
    driver.input_seconds = 0.0
    for worker in "ab":
        driver.request(worker)
    told = []
    for _ in range(6):
        begun = driver.now
        for worker, seconds_per_step in (("a", 1.0), ("b", 4.0)):
            granted = driver.places[worker, 0].granted
            assert granted is not None
            driver.now = max(driver.now, begun + seconds_per_step * granted.ticket.local_steps)
            driver.push(worker, 1.0)
        for worker in "ab":
            driver.request(worker)
        told.append([granted.ticket.local_steps for granted in driver.granted[-2:]])
    assert told == [[H, H // 4]] * 6


def test_discarded_gradients_tell_the_speed_too() -> None:
    driver = driver_of(by_speed(discard_delay=1), "a", "b")
    found = train(driver, {"a": 1.0, "b": 4.0}, 20)
    assert found["b"][0] == H // 4


# Recovery


def through_json(taken: Snapshot) -> Snapshot:
    return Snapshot(taken.tensors, json.loads(json.dumps(taken.fields)))


@pytest.mark.parametrize("scheduler", ["asynchronous", "synchronous"])
def test_a_snapshot_and_the_inputs_after_it_lead_to_the_same_tickets(scheduler: str) -> None:
    driver = driver_of(by_speed(scheduler=scheduler), *"abc")
    speeds = {"a": 1.0, "b": 2.0, "c": 5.0}
    if scheduler == "synchronous":
        speeds = {"a": 1.0}
        driver.leave("b")
        driver.leave("c")
    train(driver, speeds, 20)
    other = snapshot.resume(driver.machine.run, through_json(snapshot.take(driver.machine)))
    assert fingerprint(other) == fingerprint(driver.machine)
    told = told_by(driver.machine)
    train(driver, speeds, 20)
    replay(other, told, driver.gradients)
    assert fingerprint(other) == fingerprint(driver.machine)
    assert [ticket.local_steps for ticket in other.state.tickets.values()] == [
        ticket.local_steps for ticket in driver.machine.state.tickets.values()
    ]


def restored(machine: StateMachine, run: Run) -> StateMachine:
    return snapshot.restore(run, through_json(snapshot.take(machine)), epoch=7, keep_tickets=True)


def test_a_restart_with_the_same_settings_keeps_members_tickets_and_speeds() -> None:
    driver = driver_of(by_speed(), "a", "b")
    train(driver, {"a": 1.0, "b": 4.0}, 20)
    driver.machine = restored(driver.machine, by_speed())
    assert driver.push("b", 1.0, local_steps=H // 4).delay > 0
    driver.request("b")
    assert driver.granted[-1].ticket.local_steps == H // 4


@pytest.mark.parametrize(("before", "after"), [(H, 0), (0, H), (H, 2 * H)])
def test_a_restart_with_other_local_steps_has_everybody_join_again(before: int, after: int) -> None:
    driver = driver_of(local_run(local_steps=before), "a", "b")
    for worker in "ab":
        driver.request(worker)
    driver.exchange("a", 1.0)
    driver.machine = restored(driver.machine, local_run(local_steps=after))
    state = driver.machine.state
    assert (state.members, state.tickets, state.iteration) == ({}, {}, 1)
    with pytest.raises(NotAMember):
        driver.push("a", 1.0, local_steps=after)
    driver.join("a", incarnation=2)
    driver.request("a")
    assert driver.granted[-1].ticket.local_steps == after
    assert driver.push("a", 1.0).iteration == 2


def test_a_restart_without_by_speed_gives_all_steps_to_everybody() -> None:
    driver = driver_of(by_speed(), "a", "b")
    train(driver, {"a": 1.0, "b": 4.0}, 20)
    driver.machine = restored(driver.machine, local_run())
    driver.request("b")
    assert driver.granted[-1].ticket.local_steps == H


def fields_of(run: Run) -> dict[str, Any]:
    driver = driver_of(run, "a")
    driver.request("a")
    driver.exchange("a", 1.0)
    return snapshot.take(driver.machine).fields


def test_a_run_of_gradients_writes_what_it_wrote_before_there_were_local_steps() -> None:
    told = fields_of(run_of())
    assert "local_steps" not in told
    assert not told["members"][0].keys() & {"pace", "local_steps"}
    assert "local_steps" not in told["tickets"][0]
    told = fields_of(by_speed())
    assert (told["local_steps"], told["tickets"][0]["local_steps"]) == (H, H)
    assert told["members"][0]["pace"] == {"steps": 16.0, "seconds": 1.0, "pushed_seconds": 3.0}


# Which pushes are taken


@pytest.mark.parametrize(
    ("most", "came", "expected"),
    [
        (H, 0, "holds 0 local steps: this run takes 1 to 16, as the server has --local-steps 16"),
        (H, 17, "holds 17 local steps: this run takes 1 to 16"),
        (H, -1, "holds -1 local steps"),
        (0, 1, "holds 1 local steps: this run takes 0, a gradient"),
        (0, -1, "holds -1 local steps"),
    ],
)
def test_a_push_of_the_other_kind_is_refused_and_leaves_the_state(most: int, came: int, expected: str) -> None:
    driver = driver_of(local_run(local_steps=most), "a")
    driver.request("a")
    before = fingerprint(driver.machine)
    with pytest.raises(BadRequest, match=expected):
        driver.push("a", 1.0, local_steps=came)
    assert fingerprint(driver.machine) == before
    assert driver.push("a", 1.0).iteration == 1


@pytest.mark.parametrize("came", [1, 5, H])
def test_fewer_steps_than_the_ticket_says_are_as_good(came: int) -> None:
    driver = driver_of(local_run(), "a")
    driver.request("a")
    assert driver.push("a", 1.0, local_steps=came).iteration == 1


def test_a_pseudo_gradient_takes_as_much_memory_as_a_gradient() -> None:
    assert memory_need(by_speed(), 1000, 4, 8) == memory_need(run_of("sgd"), 1000, 4, 8)
