"""Which tensors lie in the same memory, so that writing one would change another."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def shared(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Pairs of tensors that have a byte in common, and (paired with itself) a tensor that has one byte twice.

    Args:
        tensors: by name; those that are not strided, as sparse ones, are not looked at.

    Yields:
        The later of the two, as they were given, and the earlier.
    """
    strided = [(name, each) for name, each in tensors if each.numel() and each.layout == torch.strided]
    spans = [_Span(number, name, each) for number, (name, each) in enumerate(strided)]
    reaching: list[_Span] = []  # beyond the start of the next one
    for span in sorted(spans, key=lambda span: (span.device, span.start)):
        if _has_a_byte_twice(span.tensor):
            yield span.name, span.name
        reaching = [other for other in reaching if other.device == span.device and span.start < other.end]
        for other in reaching:
            if _overlap(other.tensor, span.tensor):
                earlier, later = sorted((span, other), key=lambda each: each.number)
                yield later.name, earlier.name
        reaching.append(span)


class _Span:
    """The memory from a tensor's first byte to its last, all of its own or not."""

    def __init__(self, number: int, name: str, tensor: Tensor) -> None:
        self.number = number
        self.name = name
        self.tensor = tensor
        self.device = str(tensor.device)
        self.start = tensor.data_ptr()
        self.end = self.start + length_of(tensor)


def length_of(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _has_a_byte_twice(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    return int(_marked(tensor, length_of(tensor), 0).count_nonzero()) < tensor.numel() * tensor.element_size()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether they share a byte; columns of one matrix, say, do not, though each lies between the other's."""
    apart = second.data_ptr() - first.data_ptr()
    length = max(length_of(first), apart + length_of(second))
    return bool((_marked(first, length, 0) & _marked(second, length, apart)).any())


def _marked(tensor: Tensor, length: int, start: int) -> Tensor:
    """Bytes of memory, true where the tensor has an element of its own; shape (length,)."""
    marks = torch.zeros(length, dtype=torch.bool, device="cpu")
    size = tensor.element_size()
    strides = (*(stride * size for stride in tensor.stride()), 1)
    marks.as_strided((*tensor.shape, size), strides, start).fill_(1)
    return marks
