"""Random stories of a run, for property tests: what workers do, in which order, and how some of them get lost."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from core.driving import Driver
from ormo_server.core.errors import TicketUnknown
from ormo_server.core.ids import SlotKey
from ormo_server.core.method import Method, Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.core.step_size import STEP_SCALES, LearningRate

SIZE = 3
START = torch.tensor([0.5, -3.0, 100.0])


class Command(NamedTuple):
    verb: str
    who: int
    value: int


# Weighted so that a long story applies about 30 gradients and loses a few tickets in each possible way.
VERBS = (
    *["exchange"] * 6,
    *["push"] * 3,
    *("request", "everyone", "join", "leave", "replace", "return", "expire", "stop_listening"),
)
WHO = st.sampled_from([*range(10), *[0] * 6])  # number 0 is fast, so that the others come late
OPENING = [Command("join", 0, 0), Command("join", 1, 2), Command("join", 2, 1), Command("everyone", 0, 1)]


def stories(*more_verbs: str) -> st.SearchStrategy[list[Command]]:
    """Short ones shrink to what matters; left to itself hypothesis would hardly draw a long one."""
    command = st.builds(Command, st.sampled_from(VERBS + more_verbs), WHO, st.integers(-8, 8))
    short, long = st.lists(command, max_size=10), st.lists(command, min_size=30, max_size=70)
    return st.one_of(short, long, long).map(lambda story: OPENING + story)


def learning_rates() -> st.SearchStrategy[LearningRate]:
    return st.sampled_from(
        [
            LearningRate(0.25),
            LearningRate(0.3, warmup_gradients=7),
            LearningRate(0.5, kind="milestones", milestones=(4, 9), factor=0.1, warmup_gradients=2),
            LearningRate(0.1, kind="cosine", cosine_gradients=20, final=0.01),
        ]
    )


BETAS = st.sampled_from([0.0, 0.5, 0.9, 0.99])
BOUNDS = st.sampled_from([0, 1, 2, 5, 12])
# Most of one step, and with it whether slower workers make fewer.
LOCAL_STEPS = st.sampled_from([(0, False), (0, False), (16, False), (16, True)])


@st.composite
def runs(draw: st.DrawFn, rules: Iterable[str] = ("ormo",), schedulers: Iterable[str] = tuple(SCHEDULERS)) -> Run:
    scheduler = draw(st.sampled_from(list(schedulers)))
    rule, bucket = draw(st.sampled_from(list(rules))), "sum"
    if scheduler != "synchronous" and UPDATE_RULES[rule].takes_mean_of_bucket:
        bucket = draw(st.sampled_from(["sum", "mean"]))
    method = Method(
        rule=rule,
        scheduler=scheduler,
        scale=draw(st.sampled_from(list(STEP_SCALES))),
        discard_delay=draw(st.sampled_from([None, None, None, 2, 6])),
        staleness_bound=draw(BOUNDS) if scheduler == "bounded-staleness" else None,
        bucket=bucket,
    )
    fixed = None if scheduler == "synchronous" else draw(st.sampled_from([None, 1, 3]))
    compensation = draw(st.sampled_from([0.0, 1e-6, 1e-5]))  # more would blow up on gradients of this size
    local_steps, by_speed = draw(LOCAL_STEPS)
    return Run(
        draw(learning_rates()),
        method,
        draw(BETAS),
        fixed,
        max_workers=10,
        delay_compensation=compensation,
        local_steps=local_steps,
        local_steps_by_speed=by_speed,
    )


def carry_out(driver: Driver, command: Command) -> None:
    """Do what the command says, as far as anybody is there who can."""
    verb, who, value = command
    if verb == "join":
        _join(driver, f"w{who}", value)
    elif driver.places:
        key = list(driver.places)[who % len(driver.places)]
        _DO[verb](driver, key, value)


def fresh_incarnation(driver: Driver) -> int:
    """A number that no process of the story has had: the clock moves with every input."""
    return int(driver.now) + 1


def _join(driver: Driver, worker: str, value: int) -> None:
    if worker not in driver.incarnations:
        most = 1 if driver.machine.run.method.scheduler == "synchronous" else 3
        driver.join(worker, 1 + abs(value) % most, fresh_incarnation(driver))


def gradient(value: int) -> torch.Tensor:
    """A vector of SIZE numbers of different sizes and signs."""
    return value * torch.tensor([0.1, -1.0, 7.0]) + torch.tensor([0.01, 0.3, -1.0])


def _push(driver: Driver, key: SlotKey, value: int) -> None:
    place = driver.places[key]
    if place.granted is None:
        return
    try:
        driver.push(key[0], gradient(value), key[1])
    except TicketUnknown:  # it expired and the process did not know
        place.granted = None


def _request(driver: Driver, key: SlotKey, value: int) -> None:
    driver.request(*key)


def _exchange(driver: Driver, key: SlotKey, value: int) -> None:
    _push(driver, key, value)
    driver.request(*key)


def _everyone(driver: Driver, key: SlotKey, value: int) -> None:
    for each in list(driver.places):
        _exchange(driver, each, value)


def _leave(driver: Driver, key: SlotKey, value: int) -> None:
    driver.leave(key[0])


def _replace(driver: Driver, key: SlotKey, value: int) -> None:
    driver.join(key[0], 1, fresh_incarnation(driver))


def _return(driver: Driver, key: SlotKey, value: int) -> None:
    if driver.places[key].granted is not None:
        driver.hand_back(*key)


def _expire(driver: Driver, key: SlotKey, value: int) -> None:
    """The oldest ticket times out; its holder learns of it only when it pushes."""
    state = driver.machine.state
    for ticket in list(state.tickets.values())[:1]:
        worker = ticket.slot[0]
        assert driver.give_back(worker, ticket.key)


def _stop_listening(driver: Driver, key: SlotKey, value: int) -> None:
    """The slot's stream breaks, if it waits; it may ask again."""
    driver.withdraw(*key)


def _tune(driver: Driver, key: SlotKey, value: int) -> None:
    """The operator sets the learning rate."""
    driver.set_learning_rate(driver.machine.run.learning_rate.peak * (1.5 + abs(value) / 4) / 2)


_DO = {
    "exchange": _exchange,
    "push": _push,
    "request": _request,
    "everyone": _everyone,
    "leave": _leave,
    "replace": _replace,
    "return": _return,
    "expire": _expire,
    "stop_listening": _stop_listening,
    "tune": _tune,
}
