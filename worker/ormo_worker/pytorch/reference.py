"""What local steps are measured from; apart from how they are pushed, which a simulation does without."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


class Reference:
    """Parameters as they were when they were loaded, and then how far they have moved since; on their devices.

    Args:
        parameters: the model's trained ones.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        sizes: dict[torch.device, int] = {}
        for each in parameters:
            sizes[each.device] = sizes.get(each.device, 0) + each.numel()
        # In one piece for each device: then one operation finds out whether all is finite.
        self._flats = {device: torch.empty(size, dtype=torch.float32, device=device) for device, size in sizes.items()}
        self._values: list[Tensor] = []
        left = dict(self._flats)
        for each in parameters:
            own, left[each.device] = left[each.device].tensor_split([each.numel()])
            self._values.append(own.view(each.shape))

    @torch.no_grad()
    def note(self) -> None:
        """The parameters are now where they begin."""
        torch._foreach_copy_(self._values, list(self._parameters))

    @torch.no_grad()
    def take_moves(self, moving: Collection[Tensor]) -> list[Tensor]:
        """Begin less end, for each parameter: shape of the parameter, float32, in the reference's own memory.

        Args:
            moving: those that are moved; of all others it is zero, whatever the program has done to them.
        """
        torch._foreach_sub_(self._values, list(self._parameters))
        resting = [value for value, each in zip(self._values, self._parameters, strict=True) if each not in moving]
        if resting:
            torch._foreach_zero_(resting)
        return self._values

    def in_a_row(self) -> Tensor:
        """The moves of all parameters, one after the other, shape (d,); uncopied, if they are on one device."""
        if len(self._flats) == 1:
            return next(iter(self._flats.values()))
        return torch.cat([value.flatten().cpu() for value in self._values])

    def is_finite(self) -> bool:
        """Whether all moves are numbers; waits for their devices."""
        extremes = (torch.stack(torch.aminmax(flat)) for flat in self._flats.values() if len(flat))
        return all(bool(both.isfinite().all()) for both in extremes)
