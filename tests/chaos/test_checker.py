"""The checker finds what is planted, each alone, and nothing in a sound run."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from chaos.checker import violations
from chaos.evidence import Applied, Evidence, Told, merged
from chaos.loads import MARKS

COUNT = 6


def sound() -> Evidence:
    """Two workers in turn; the last gradient of each was never acknowledged, that of w1 not applied."""
    names = [(f"w{number % 2}", 1 + number // 2) for number in range(COUNT)]
    evidence = Evidence(
        tried={name: (7, number) for number, name in enumerate(names)},
        told=[Told(name, 7, number) for number, name in enumerate(names[:4], start=1)],
        applied=[Applied(name, (7, number), number + 1) for number, name in enumerate(names[:5])],
        starts={7: 0},
        end=5,
        silences=[("w0", 0.5)],
        memory=[300_000_000] * 12,
    )
    evidence.parameters = counted(evidence)
    return evidence


def counted(evidence: Evidence) -> list[float]:
    names = [each.name for each in evidence.applied or ()]
    mine = [[number for worker, number in names if worker == f"w{column}"] for column in range(2)]
    return [*(-float(len(one)) for one in mine), *(-float(sum(number % MARKS for number in one)) for one in mine)]


def found(evidence: Evidence, *, plain_sgd: bool = True) -> list[str]:
    return violations(evidence, workers=2, bound_seconds=5.0, plain_sgd=plain_sgd)


def test_nothing_is_wrong_with_a_sound_run() -> None:
    assert found(sound()) == []


def applied(change: Callable[[list[Applied]], object]) -> Callable[[Evidence], object]:
    def plant(evidence: Evidence) -> None:
        assert evidence.applied is not None
        change(evidence.applied)
        evidence.parameters, evidence.end = counted(evidence), len(evidence.applied)

    return plant


def lose_last_acknowledged(rows: list[Applied]) -> None:
    rows[3:] = [replace(rows[4], iteration=4)]


PLANTED: dict[str, tuple[Callable[[Evidence], object], str]] = {
    "lost": (applied(lose_last_acknowledged), "('w1', 2) was acknowledged at iteration 4 and is lost"),
    "doubled": (
        applied(lambda rows: rows.append(replace(rows[0], ticket=(7, 99), iteration=6))),
        "gradient ('w0', 1) was applied 2 times",
    ),
    "ticket used twice": (
        applied(lambda rows: rows.append(Applied(("w1", 3), (7, 0), 6))),
        "ticket (7, 0) was used 2 times",
    ),
    "gap": (
        applied(lambda rows: rows.__setitem__(4, replace(rows[4], iteration=6))),
        "iteration 6 came where 5 was expected",
    ),
    "short end": (lambda evidence: setattr(evidence, "end", 4), "the last checkpoint is at iteration 4"),
    "wrong iteration": (
        lambda evidence: evidence.told.__setitem__(0, Told(("w0", 1), 7, 2)),
        "('w0', 1) was acknowledged at 2 and applied at 1",
    ),
    "never tried": (
        lambda evidence: evidence.tried.pop(("w0", 1)),
        "('w0', 1) was applied for ticket (7, 0), and its worker had None",
    ),
    "refused and applied": (
        lambda evidence: evidence.refused.update({("w0", 3): "NON_FINITE"}),
        "('w0', 3) was refused (NON_FINITE) and applied",
    ),
    "another state": (lambda evidence: evidence.differences.append("life 1: params differ"), "params differ"),
    "other parameters": (
        lambda evidence: evidence.parameters.__setitem__(2, -99.0),
        "3 gradients of w0 with marks 99, the journal 3 with 6",
    ),
    "one more in the parameters": (
        lambda evidence: evidence.parameters.__setitem__(0, -4.0),
        "the parameters have 6 gradients, and the iteration is 5",
    ),
    "stuck": (lambda evidence: evidence.silences.append(("w1", 5.1)), "worker w1 was silent for 5.1 s"),
    "memory": (
        lambda evidence: evidence.memory.__setitem__(slice(8, 12), [400_000_000] * 4),
        "memory grew from 300 to 400 MB",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name: str) -> None:
    plant, sentence = PLANTED[name]
    evidence = sound()
    plant(evidence)
    assert any(sentence in violation for violation in found(evidence)), found(evidence)


def without_journal() -> Evidence:
    """The server was killed after iteration 5 and went on from 3; two more came."""
    evidence = sound()
    evidence.applied, evidence.starts, evidence.end = None, {7: 0, 8: 3}, 5
    evidence.tried |= {("w0", 4): (8, 0), ("w1", 4): (8, 1)}
    evidence.told += [Told(("w0", 4), 8, 4), Told(("w1", 4), 8, 5)]
    evidence.parameters = [-3.0, -2.0, -7.0, -5.0]
    return evidence


def test_without_a_journal_what_came_after_the_last_checkpoint_may_be_lost() -> None:
    assert found(without_journal()) == []


def test_without_a_journal_what_came_before_it_may_not() -> None:
    evidence = without_journal()
    evidence.parameters = [-2.0, -3.0, -5.0, -7.0]
    assert any("2 gradients of w0: 3 are certain" in violation for violation in found(evidence))


def test_without_a_journal_an_iteration_is_acknowledged_once() -> None:
    evidence = without_journal()
    evidence.told.append(Told(("w1", 5), 8, 4))
    assert any("iteration 4 was acknowledged 2 times" in violation for violation in found(evidence))


def test_trouble_that_overlaps_is_not_counted_twice() -> None:
    assert merged([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.7)]) == [(1.0, 4.0), (5.0, 6.0)]
