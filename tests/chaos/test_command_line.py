"""The command line: one run has several methods, each with its own size and its share of the time."""

import random

import pytest

from chaos.__main__ import _next, parsed, shares
from chaos.faults import FAULTS, KILLS


def test_one_method_has_all_the_time() -> None:
    (only,) = shares(parsed(["--seconds", "60", "--method", "ormo"]))
    assert (only.method, only.elements, only.seconds) == ("ormo", 80_000, 60.0)


def test_several_share_the_time_and_each_may_have_a_size_of_its_own() -> None:
    words = ["--seconds", "90", "--elements", "5", "--method", "asgd", "ormo", "ssgdm:1100000", "--workers", "2"]
    each = [(one.method, one.elements, one.seconds, one.workers) for one in shares(parsed(words))]
    assert each == [("asgd", 5, 30.0, 2), ("ormo", 5, 30.0, 2), ("ssgdm", 1_100_000, 30.0, 2)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sgd"], "'sgd' came, and expected was one of "),
        (["ormo:many"], "'ormo:many' came"),
        (["ormo:"], "'ormo:' came"),
        (["ormo", "asgd", "ormo:5"], "a method may be named once, and these were: ormo, asgd, ormo"),
    ],
)
def test_what_is_no_method_is_said(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["--method", *words])
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("seed", range(20))
def test_each_method_begins_with_a_kill_and_each_kind_of_fault_comes_before_any_comes_twice(seed: int) -> None:
    dice = random.Random(seed)
    unseen = dice.sample(list(FAULTS), len(FAULTS))
    came = [_next(list(FAULTS), unseen, dice, first=turn % 8 == 0) for turn in range(len(FAULTS))]
    assert sorted(name for (name,) in came) == sorted(FAULTS)
    assert {came[0][0], came[8][0]} <= set(KILLS)
    assert _next(list(FAULTS), unseen, dice, first=True)[0] in KILLS
    assert unseen == []


def test_a_fault_that_a_method_can_not_have_waits_for_one_that_can() -> None:
    unseen = ["slow reader", "SIGKILL of the server"]
    assert _next(["SIGKILL of the server"], unseen, random.Random(0), first=False) == ["SIGKILL of the server"]
    assert unseen == ["slow reader"]


def test_where_the_server_is_never_killed_a_method_begins_with_what_there_is() -> None:
    assert _next(["slow disk"], ["slow disk"], random.Random(0), first=True) == ["slow disk"]
