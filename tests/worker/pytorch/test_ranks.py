"""What a worker's ranks tell each other; that they do is tested with real processes in `tests/system/test_group.py`."""

import pickle

import pytest

from ormo_worker.errors import GroupBroken, OptionRefused, Refused, Replaced, RunFinished
from ormo_worker.pytorch.ranks import Row, ranks_of
from ormo_worker.pytorch.relay import Failure, _alike

NAN = float("nan")


def test_what_is_no_process_group_is_refused() -> None:
    assert ranks_of(None) is None
    with pytest.raises(OptionRefused, match="process_group is True: expected the process group whose ranks are this"):
        ranks_of(True)


@pytest.mark.parametrize("error", [Refused("no", "LOCAL_STEPS"), Replaced("gone"), RunFinished("over")])
def test_an_error_of_ours_is_the_same_in_the_other_ranks(error: Exception) -> None:
    told = pickle.loads(pickle.dumps(Failure.of(error))).error()
    assert (type(told), str(told)) == (type(error), str(error))
    assert getattr(told, "reason", "") == getattr(error, "reason", "")


def test_any_other_error_says_that_rank_0_has_failed() -> None:
    told = Failure.of(KeyboardInterrupt()).error()
    assert isinstance(told, GroupBroken)
    assert str(told).endswith("has failed and takes no further part in the run: KeyboardInterrupt")


@pytest.mark.parametrize("loss", [None, 0.0, -2.5])
def test_a_row_is_read_as_it_was_written(loss: float | None) -> None:
    row = Row(2, 2**31 - 1, loss, 0.1, 1e300)
    assert Row.of(row.to_bytes()) == row


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((1.0, 2.0), (1.0, 2.0), True),
        ((1.0, 2.0), (1.0, 2.0 + 1e-6), True),  # clipped on another kind of GPU
        ((1.0, 2.0), (1.1, 2.0), False),
        ((1.0, 2.0), (1.0, 2.1), False),
        ((0.0, 0.0), (0.0, 0.0), True),
        ((NAN, NAN), (NAN, NAN), True),
        ((float("inf"), NAN), (NAN, float("inf")), True),
        ((1.0, 2.0), (NAN, NAN), False),
    ],
)
def test_gradients_are_alike_up_to_their_last_bits(
    one: tuple[float, float], other: tuple[float, float], same: bool
) -> None:
    first, second = (Row(0, 1, None, *each) for each in (one, other))
    assert _alike(first, second) == _alike(second, first) == same
