"""What is wrong with a run, by its evidence. No violation means that nothing was lost and nothing counted twice."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator

from chaos.evidence import Evidence, Name, Told
from chaos.loads import MARKS
from chaos.memory import grown, unmeasured

_START_BOUND_SECONDS = 60.0  # a process that loads PyTorch, on two shared cores


def violations(evidence: Evidence, *, workers: int, bound_seconds: float, plain_sgd: bool, long: bool) -> list[str]:
    """One sentence for each.

    Args:
        evidence: of the run.
        workers: columns that their gradients have.
        bound_seconds: how long a worker may be silent when nothing stands in its way.
        plain_sgd: the parameters count what was applied.
        long: the run was long enough for everything to be measured.
    """
    found = [*evidence.differences, *grown(evidence.memory), *_vacuous(evidence, workers)]
    if long:
        found += [f"nothing can be said of the memory of {whom}" for whom in unmeasured(evidence.memory)]
    found += _journaled(evidence) if evidence.applied is not None else _unjournaled(evidence)
    if plain_sgd:
        found += _counted(evidence, workers)
    return [*found, *_stuck(evidence, bound_seconds)]


def _vacuous(evidence: Evidence, workers: int) -> Iterator[str]:
    answered = {told.name[0] for told in evidence.told}
    for worker in (f"w{column}" for column in range(workers)):
        if worker not in answered:
            yield f"no gradient of {worker} was ever acknowledged: this run proves nothing of it"


def _stuck(evidence: Evidence, bound_seconds: float) -> Iterator[str]:
    for silence in evidence.silences:
        bound = _START_BOUND_SECONDS if silence.starting else bound_seconds
        if silence.seconds > bound:
            yield f"{silence.who}, was silent for {silence.seconds:.1f} s and may be for {bound:g} s"


def _journaled(evidence: Evidence) -> Iterator[str]:
    assert evidence.applied is not None
    applied = evidence.applied
    yield from _repeated("gradient", "applied", (each.name for each in applied))
    yield from _repeated("ticket", "used", (each.ticket for each in applied))
    yield from _gaps([each.iteration for each in applied if not each.discarded], evidence.end)
    where = {each.name: each for each in applied}
    for told in evidence.told:
        if told.name not in where:
            yield f"gradient {told.name} was acknowledged at iteration {told.iteration} and is lost"
        elif (at := where[told.name].iteration) != told.iteration:
            yield f"gradient {told.name} was acknowledged at {told.iteration} and applied at {at}"
    for each in applied:
        if (ticket := evidence.tried.get(each.name)) != each.ticket:
            yield f"gradient {each.name} was applied for ticket {each.ticket}, and its worker had {ticket}"
    for name, reason in evidence.refused.items():
        if name in where:
            yield f"gradient {name} was refused ({reason}) and applied"


def _repeated(what: str, done: str, names: Iterable[Hashable]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{what} {name} was {done} {count} times"


def _gaps(iterations: list[int], end: int) -> Iterator[str]:
    for expected, iteration in enumerate(iterations, start=1):
        if iteration != expected:
            yield f"iteration {iteration} came where {expected} was expected"
            break
    if len(iterations) != end:
        yield f"{len(iterations)} gradients were applied, and the last checkpoint is at iteration {end}"


def kept(evidence: Evidence) -> list[Told]:
    """Without a journal: the acknowledged gradients that the checkpoints say are in the model."""
    epochs, starts = list(evidence.starts), list(evidence.starts.values())
    limits = {epoch: min(starts[at + 1 :], default=evidence.end) for at, epoch in enumerate(epochs)}
    return [told for told in evidence.told if told.epoch not in limits or told.iteration <= limits[told.epoch]]


def _unjournaled(evidence: Evidence) -> Iterator[str]:
    survivors = kept(evidence)
    yield from _repeated("iteration", "acknowledged", (told.iteration for told in survivors))
    yield from _repeated("gradient", "acknowledged", (told.name for told in survivors))


def _counted(evidence: Evidence, workers: int) -> Iterator[str]:
    """With the rate 1, element j is minus the number of column j's gradients, and the next ones sum their marks."""
    counts = [-round(value) for value in evidence.parameters[:workers]]
    if sum(counts) != evidence.end:
        yield f"the parameters have {sum(counts)} gradients, and the iteration is {evidence.end}"
    for column, count in enumerate(counts):
        worker = f"w{column}"
        marks = -round(evidence.parameters[workers + column])
        if evidence.applied is not None:
            names = [each.name for each in evidence.applied if each.name[0] == worker and not each.discarded]
            if (count, marks) != (len(names), _marks(names)):
                yield (
                    f"the parameters have {count} gradients of {worker} with marks {marks}, the journal {len(names)} "
                    f"with {_marks(names)}"
                )
        else:
            certain = sum(told.name[0] == worker for told in kept(evidence))
            told = {told.name for told in evidence.told}
            open_ = sum(name[0] == worker and name not in told for name in evidence.tried)
            if not certain <= count <= certain + open_:
                yield f"the parameters have {count} gradients of {worker}: {certain} are certain, {open_} are open"


def _marks(names: list[Name]) -> int:
    return sum(number % MARKS for _, number in names)
