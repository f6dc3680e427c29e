"""The checker finds what is planted, each alone, and nothing in a sound run."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from chaos.checker import violations
from chaos.diaries import merged
from chaos.evidence import Applied, Evidence, Silence, Told
from chaos.loads import MARKS
from chaos.memory import SERVER, Life

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
        silences=[Silence("worker w0, process 1", 0.5), Silence("worker w0, process 1", 9.0, starting=True)],
        memory=[steady(f"{SERVER}, process 1"), steady("w0, process 2")],
    )
    evidence.parameters = counted(evidence)
    return evidence


def steady(who: str, *, seconds: int = 40) -> Life:
    """It grows at its start, as all do."""
    return Life(who, [(at, min(300, 200 + 20 * at) * 1_000_000) for at in range(seconds)])


def leaking(who: str) -> Life:
    return Life(who, [(at, size + 8_000_000 * round(at)) for at, size in steady(who).samples])


def counted(evidence: Evidence) -> list[float]:
    names = [each.name for each in evidence.applied or ()]
    mine = [[number for worker, number in names if worker == f"w{column}"] for column in range(2)]
    return [*(-float(len(one)) for one in mine), *(-float(sum(number % MARKS for number in one)) for one in mine)]


def found(evidence: Evidence, *, plain_sgd: bool = True) -> list[str]:
    return violations(evidence, workers=2, bound_seconds=5.0, plain_sgd=plain_sgd, long=True)


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
    "stuck": (
        lambda evidence: evidence.silences.append(Silence("worker w1, process 3", 5.1)),
        "worker w1, process 3, was silent for 5.1 s",
    ),
    "stuck at its start": (
        lambda evidence: evidence.silences.append(Silence("worker w1, process 3", 61.0, starting=True)),
        "worker w1, process 3, was silent for 61.0 s and may be for 60 s",
    ),
    "a leak of the server": (
        lambda evidence: evidence.memory.append(leaking(f"{SERVER}, process 4")),
        "the memory of the server, process 4 grew from ",
    ),
    "a leak of a worker": (
        lambda evidence: evidence.memory.append(leaking("w0, process 5")),
        "the memory of w0, process 5 grew from ",
    ),
    "each life takes more": (
        lambda evidence: evidence.memory.extend(
            Life(f"{SERVER}, process {at}", [(0.0, at * 100_000_000), (2.0, at * 100_000_000)]) for at in range(1, 10)
        ),
        "the server's memory from life to life grew from 200 to 800 MB",
    ),
    "memory of nobody": (
        lambda evidence: evidence.memory.clear(),
        "nothing can be said of the memory of the workers",
    ),
    "nobody answered": (
        lambda evidence: evidence.told.clear(),
        "no gradient of w0 was ever acknowledged",
    ),
    "one worker not answered": (
        lambda evidence: evidence.told.__delitem__(slice(1, None)),
        "no gradient of w1 was ever acknowledged",
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
