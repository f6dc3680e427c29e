"""What a program does to parameters between two steps, which the next delivery would overwrite without a word."""

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ormo_worker.copy_streams import Arriving
from ormo_worker.memory import length_of

_SAMPLE = 64  # elements of each tensor: they find all but small changes, and cost little beside loading the tensor


class LocalChanges:
    """Finds parameters that are no longer as they were loaded.

    A tensor's version tells of what is done to it in place, and its address of other memory in its place; whether its
    values are other ones, too, is then seen by comparing all of them, for a program may well put back what it took.
    Neither tells of what is written through `.data`: for that some elements of each tensor, always the same ones, are
    compared in each step. That is one operation for all tensors of a device. Nobody waits for a GPU's answer: it is
    taken when it is there, one step later or a few.

    Args:
        names: of the parameters.
        parameters: in the same order.
        fetch: gets a tensor from its device.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], fetch: Callable[[Tensor], Arriving]) -> None:
        self._names = names
        self._parameters = parameters
        self._fetch = fetch
        self._marks: list[tuple[int, int]] = []
        self._samples: list[_Samples] = []
        self._asked: deque[tuple[_Samples, Arriving]] = deque()

    @torch.no_grad()
    def loaded(self) -> None:
        """The parameters are now as they are meant to be."""
        addresses = [address for _, address in self._marks]
        self._marks = [_mark(parameter) for parameter in self._parameters]
        if addresses != [address for _, address in self._marks]:
            self._samples = list(self._drawn())
        for samples in self._samples:
            samples.note()

    @torch.no_grad()
    def found(self, loaded: Sequence[Tensor] | None, known: Collection[str]) -> list[str]:
        """The names of those that have changed since.

        Args:
            loaded: the values that they should have, in any floating dtype; None where these are not kept: then some
                elements must do, and the address.
            known: names that need not be found again.
        """
        for samples in self._samples:
            differing = samples.differing()
            if differing is not None:
                self._asked.append((samples, self._fetch(differing)))
        found = set(self._answers())
        rows = list(zip(self._names, self._parameters, self._marks, strict=False))  # no marks before the first loading
        if loaded is None:
            found |= {name for name, parameter, (_, address) in rows if parameter.data_ptr() != address}
        for (name, parameter, mark), value in zip(rows, loaded or (), strict=False):
            if _mark(parameter) != mark and name not in known and name not in found:
                found |= set() if torch.equal(parameter, value.to(parameter)) else {name}
        return [name for name in self._names if name in found and name not in known]

    def _answers(self) -> Iterator[str]:
        while self._asked and self._asked[0][1].here():
            samples, answer = self._asked.popleft()
            yield from samples.names(answer.arrived())

    def _drawn(self) -> "Iterator[_Samples]":
        views: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if parameter.numel():
                views[parameter.device][name] = _sample(parameter.detach())
        return map(_Samples, views.values())


class _Samples:
    """Some elements of all tensors on one device.

    Args:
        views: of them, by the tensors' names.
    """

    def __init__(self, views: dict[str, Tensor]) -> None:
        self._names = list(views)
        self._views = list(views.values())
        self._ends = list(accumulate(view.numel() for view in self._views))
        self._noted = torch.cat(self._views)

    def note(self) -> None:
        """They are now as they are meant to be."""
        torch.cat(self._views, out=self._noted)

    def differing(self) -> Tensor | None:
        """Which elements are not as noted; shape (all of them,), bool. None for none, where that is soon known."""
        now = torch.cat(self._views)
        if now.device.type == "cpu" and torch.equal(now, self._noted):
            return None
        return now != self._noted

    def names(self, differing: Tensor) -> Iterator[str]:
        """Of the tensors that have such elements, once for each."""
        return (self._names[bisect_right(self._ends, at)] for at in differing.nonzero().flatten().tolist())


def _mark(tensor: Tensor) -> tuple[int, int]:
    """What changes if the tensor does, by all ways but `.data`."""
    return tensor._version, tensor.data_ptr()  # noqa: SLF001 (it has no public name)


def _sample(tensor: Tensor) -> Tensor:
    """A view of some elements, in one dimension: spread evenly over its memory, or its diagonal if that has gaps."""
    if length_of(tensor) == tensor.nbytes:
        step = -(-tensor.numel() // _SAMPLE)
        return tensor.as_strided((-(-tensor.numel() // step),), (step,))
    return tensor.as_strided((min(_SAMPLE, *tensor.shape),), (sum(tensor.stride()),))
