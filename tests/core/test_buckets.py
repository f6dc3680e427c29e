"""Which bucket a ticket gets: for constant K the paper's ceil(ite / K), moved by nothing but applied gradients."""

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.driving import Driver, driver_of, rows, run_of
from core.scripts import START, Command, carry_out, gradient, stories
from ormo_server.core.machine import StateMachine

TURNS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["exchange", "exchange", "request", "return"])),
    min_size=20,
    max_size=80,
)


def ceil_of(iteration: int, size: int) -> int:
    return -(-iteration // size)


@settings(max_examples=100, deadline=None)
@given(turns=TURNS)
def test_buckets_are_the_iteration_index_over_k_rounded_up_while_nobody_joins_or_leaves(
    turns: list[tuple[int, str]],
) -> None:
    driver = driver_of(run_of(), "a", "b", "c", size=START.numel(), slots=2)
    for which, verb in turns:
        carry_out(driver, Command(verb, which, 0))
    assert driver.machine.bucket_size == 6
    for granted in driver.granted:
        assert granted.ticket.bucket == ceil_of(granted.ticket.iteration, 6)


@settings(max_examples=100, deadline=None)
@given(story=stories(), size=st.integers(1, 7))
def test_with_a_fixed_k_buckets_do_not_depend_on_who_comes_and_goes(story: list[Command], size: int) -> None:
    driver = Driver(StateMachine.fresh(run_of(bucket_size=size, max_workers=10), START.clone()))
    for command in story:
        carry_out(driver, command)
    assert driver.granted
    for granted in driver.granted:
        assert granted.ticket.bucket == ceil_of(granted.ticket.iteration, size)


@settings(max_examples=50, deadline=None)
@given(turns=st.lists(st.integers(0, 3), min_size=20, max_size=60))
def test_in_rounds_of_constant_k_buckets_are_the_same_formula(turns: list[int]) -> None:
    driver = driver_of(run_of(scheduler="synchronous", min_workers=4), *"abcd")
    for worker in "abcd":
        driver.request(worker)
    for which in turns:
        if driver.places["abcd"[which], 0].granted is not None:
            driver.exchange("abcd"[which], 1.0)
    for granted in driver.granted:
        assert granted.ticket.bucket == ceil_of(granted.ticket.iteration, 4)


# K changes between gradients: `joined` and `left` are slots that come and go before the gradient of the row; `ite` is
# of the ticket handed out after it. The first gradient opens bucket 1; a bucket is full at K gradients, the K of then.
CHANGING_K = """
    joined  left  K  ite  bucket
         2     0  2    1       1
         0     0  2    2       1
         0     0  2    3       2
         2     0  4    4       2
         0     0  4    5       2
         0     0  4    6       2
         0     0  4    7       3
         0     2  2    8       3
         0     0  2    9       4
         0     1  1   10       5
         0     0  1   11       6
"""


def test_a_bucket_is_full_when_it_has_as_many_gradients_as_there_are_slots_now() -> None:
    driver = driver_of(run_of())
    for number, row in enumerate(rows(CHANGING_K)):
        for slot in range(int(row["joined"])):
            driver.join(f"w{number}.{slot}")
        for worker in list(driver.incarnations)[::-1][: int(row["left"])]:
            driver.leave(worker)
        driver.request("w0.0")
        driver.exchange("w0.0", 1.0)
        ticket = driver.granted[-1].ticket
        assert (driver.machine.bucket_size, ticket.iteration, ticket.bucket) == (row["K"], row["ite"], row["bucket"])


def trajectory(interruption: Callable[[Driver], None]) -> list[torch.Tensor]:
    """w and u after each of 40 gradients, with the interruption after the first 5."""
    driver = driver_of(run_of(momentum=0.9), "busy", "late", "idle", size=START.numel())
    for worker in ("busy", "late", "idle"):
        driver.request(worker)
    seen = []
    for step in range(40):
        if step == 5:
            interruption(driver)
        driver.exchange("late" if step % 7 == 6 else "busy", gradient(step))
        seen += [driver.machine.state.params.clone(), driver.machine.state.rule.vectors["momentum"].clone()]
    return seen


def test_a_thousand_pulls_that_never_push_leave_the_later_trajectory_bit_for_bit_as_it_was() -> None:
    def pull_a_thousand_times(driver: Driver) -> None:
        for _ in range(1000):
            driver.request("idle")

    undisturbed, disturbed = trajectory(lambda driver: None), trajectory(pull_a_thousand_times)
    assert all(torch.equal(one, other) for one, other in zip(undisturbed, disturbed, strict=True))


def test_returned_and_expired_tickets_and_discarded_gradients_move_no_bucket() -> None:
    driver = driver_of(run_of(discard_delay=2), "a", "b")
    driver.request("b")
    driver.request("a")
    driver.exchange("a", 1.0)
    driver.exchange("a", 1.0)
    before = (driver.machine.state.issue, driver.machine.state.filled, driver.machine.state.newest_bucket)
    assert driver.push("b", 1.0).discarded
    driver.hand_back("a")
    driver.request("a")
    assert driver.give_back("a", driver.ticket("a"))
    assert (driver.machine.state.issue, driver.machine.state.filled, driver.machine.state.newest_bucket) == before
    assert before == (1, 2, 1)
