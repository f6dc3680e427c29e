"""What is said of the mini-batch that a step is made of."""

from typing import NamedTuple, Self

from torch import Tensor

from ormo_protos.limits import MAX_SAMPLES
from ormo_worker.client.arguments import describe, one_number, whole_number
from ormo_worker.errors import OptionRefused


class BatchFigures(NamedTuple):
    """Figures of a mini-batch, None where they are not known.

    Attributes:
        samples: how many it had.
        loss: their mean, perhaps still on its device.
    """

    samples: int | None = None
    loss: float | Tensor | None = None

    @classmethod
    def checked(cls, samples: float | Tensor | None, loss: float | Tensor | None) -> Self:
        """What a program says of it.

        Raises:
            OptionRefused: these are no such numbers.
        """
        count = None if samples is None else whole_number("samples", samples, 0, MAX_SAMPLES)
        shown = one_number(loss)
        if loss is not None and shown is None:
            raise OptionRefused(f"loss is {describe(loss)}: expected one real number, the mini-batch's mean")
        return cls(count, shown)

    def completed(self, noted: Self, batch_size: int, returned: object) -> tuple[int, float | Tensor | None]:
        """Samples and loss of a step that was given these.

        Args:
            noted: what was said before, for what the step was not told.
            batch_size: samples, where neither says.
            returned: by its closure, which may be the loss, or anything.
        """
        samples = noted.samples if self.samples is None else self.samples
        loss = noted.loss if self.loss is None else self.loss
        return batch_size if samples is None else samples, one_number(returned) if loss is None else loss
