"""Payload buffers: lent to one at a time, used again whatever is wanted next, never with old numbers in the padding."""

import pytest
import torch

from ormo_protos.manifest import BFLOAT16, BUFFER, FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import PayloadLayout
from ormo_server.core.errors import TooMuchInFlight
from ormo_server.service.transfers import BufferPool, BytesInFlight

MODEL = Manifest.laid_out(
    [TensorSpec("weight", (3,), FLOAT32, PARAMETER), TensorSpec("running_mean", (5,), FLOAT32, BUFFER)]
)


def layout(dtype: int = FLOAT32, *, buffers: bool = False) -> PayloadLayout:
    return PayloadLayout.of(MODEL, dtype, with_buffers=buffers)  # type: ignore[arg-type]


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_is_lent_is_nobody_elses() -> None:
    pool = BufferPool(BytesInFlight(None))
    assert memory(pool.take(layout()).parameters) != memory(pool.take(layout()).parameters)


def test_memory_is_used_again_by_whatever_fits() -> None:
    pool = BufferPool(BytesInFlight(None))
    first = pool.take(layout(buffers=True))
    pool.give(first)
    for wanted in (layout(), layout(BFLOAT16), layout(BFLOAT16, buffers=True), layout(buffers=True)):
        payload = pool.take(wanted)
        assert (payload.layout, memory(payload.parameters)) == (wanted, memory(first.parameters))
        pool.give(payload)


def test_what_is_too_small_makes_room_for_what_is_wanted() -> None:
    pool = BufferPool(BytesInFlight(None))
    pool.give(pool.take(layout(BFLOAT16)))
    pool.give(pool.take(layout(buffers=True)))
    assert pool.idle_bytes == layout(buffers=True).total_bytes


def test_a_buffer_that_fits_is_found_behind_one_that_does_not() -> None:
    pool = BufferPool(BytesInFlight(None))
    small, large = pool.take(layout(BFLOAT16)), pool.take(layout(buffers=True))
    pool.give(small)
    pool.give(large)
    assert memory(pool.take(layout()).parameters) == memory(large.parameters)
    assert memory(pool.take(layout(BFLOAT16)).parameters) == memory(small.parameters)


def test_padding_never_has_what_the_memory_held_before() -> None:
    pool = BufferPool(BytesInFlight(None))
    payload = pool.take(layout(buffers=True))
    payload.memory[:] = b"\xff" * len(payload.memory)
    pool.give(payload)
    assert bytes(pool.take(layout()).memory[12:]) == bytes(4)


def test_a_gradients_memory_serves_for_the_parameters_that_answer_it() -> None:
    pool = BufferPool(BytesInFlight(None))
    gradient = pool.take(layout(buffers=True))
    gradient.float_buffers.fill_(7.0)
    answer = pool.again(gradient, layout())
    assert answer is not None
    assert memory(answer.parameters) == memory(gradient.parameters)
    assert gradient.float_buffers.tolist() == [7.0] * 5, "its buffers are still to be used"
    pool.give(gradient)
    assert pool.idle_bytes == layout(buffers=True).total_bytes


def test_memory_is_not_shared_with_another_dtype_nor_with_what_is_larger() -> None:
    pool = BufferPool(BytesInFlight(None))
    gradient = pool.take(layout())
    assert pool.again(gradient, layout(BFLOAT16)) is None
    assert pool.again(gradient, layout(buffers=True)) is None


def test_where_there_is_no_memory_the_loan_is_refused_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own other exchanges must not be refused for what was never lent."""
    pool = BufferPool(BytesInFlight(layout().total_bytes))

    def no_memory(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched, pool.loans("a") as loans:
        patched.setattr(torch, "empty", no_memory)
        with pytest.raises(
            TooMuchInFlight, match="16 bytes are wanted for tensors, and this machine does not have that much memory"
        ) as e:
            loans.take(layout())
        assert e.value.retry_seconds == 1.0
    with pool.loans("a") as loans:
        assert loans.take(layout()).layout == layout()
