"""Does again what the journal says, and ends with the very same bits."""

from collections.abc import Iterable

import torch

from ormo_protos.tensors import Payload, torch_dtype
from ormo_server.core.effects import Granted
from ormo_server.core.errors import NonFinite, NormTooLarge, SettingsError
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Gradient
from ormo_server.core.machine import StateMachine
from ormo_server.journal.records import Delivered, Record
from ormo_server.store import StoreError


class UnsoundRecord(StoreError):
    """What an older server took, a gradient or a learning rate, is refused as unsound when it comes again."""


def replay(machine: StateMachine, records: Iterable[tuple[Record, Payload | None]], clock_seconds: float) -> float:
    """Give a machine the recorded inputs.

    Args:
        machine: as it was when the first of them came.
        records: see `Reading`.
        clock_seconds: of the run at that moment.

    Returns:
        The run's clock at the last input.

    Raises:
        StoreError: an input has another outcome than it had.
        UnsoundRecord: of an older server, which took what must not be taken.
    """
    granted: dict[SlotKey, Granted] = {}
    for number, (record, payload) in enumerate(records, start=1):
        try:
            if record.input is not None:
                given, redeemed = record.input
                effects = machine.step(given, None if payload is None else gradient_in(payload))
                same = effects.changed and effects.redeemed == redeemed
                clock_seconds = max(clock_seconds, getattr(given, "seconds", clock_seconds))
                granted |= {each.slot: each for each in effects.granted}
            else:
                same = _deliver(machine, granted, record.delivered)
        except Exception as error:
            if isinstance(error, NonFinite | NormTooLarge) or isinstance(error.__cause__ or error, SettingsError):
                raise UnsoundRecord(f"record {number} of the journal ({record}): {error}") from error
            raise _differs(number, record, f"it fails ({type(error).__name__}: {error})") from error
        if not same:
            raise _differs(number, record, "its outcome is another one")
    return clock_seconds


def gradient_in(payload: Payload, norm: float | None = None) -> Gradient:
    """What a push carried, as the core takes it."""
    with_buffers = payload.layout.with_buffers
    return Gradient(
        payload.parameters,
        payload.float_buffers if with_buffers else None,
        payload.int_buffers if with_buffers else None,
        norm,
    )


def _deliver(machine: StateMachine, granted: dict[SlotKey, Granted], delivered: Delivered | None) -> bool:
    if delivered is None:
        return False
    out = torch.empty(machine.state.params.shape, dtype=torch_dtype(delivered.dtype), device="cpu")
    machine.write_delivery(granted.pop((delivered.worker, delivered.slot)), out)
    return True


def _differs(number: int, record: Record, how: str) -> StoreError:
    return StoreError(
        f"record {number} of the journal ({record}) can't be done again as it was: {how}. Was it written by another "
        "version of this program, of PyTorch, or on another processor? Start with those: nothing was changed. To go on "
        "from the last checkpoint alone, without what the journal says, move the folder `journal` away"
    )
