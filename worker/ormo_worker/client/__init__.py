"""The worker's, or a reader's, side of the protocol: it moves gradients and parameters, and knows no optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ormo_worker.client.api import ParameterClient as ParameterClient
    from ormo_worker.client.arguments import Identity as Identity
    from ormo_worker.client.arguments import Patience as Patience
    from ormo_worker.client.messages import Delivered as Delivered
    from ormo_worker.client.messages import Gradient as Gradient
    from ormo_worker.client.slot import ExchangeOutcome as ExchangeOutcome
    from ormo_worker.client.slot import Slot as Slot

# Imported when first used: arguments need no gRPC, and what uses them alone must not wait for it.
_HOMES = {
    "Delivered": "messages",
    "ExchangeOutcome": "slot",
    "Gradient": "messages",
    "Identity": "arguments",
    "ParameterClient": "api",
    "Patience": "arguments",
    "Slot": "slot",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ormo_worker.client' has no attribute {name!r}")
    return getattr(import_module(f"ormo_worker.client.{_HOMES[name]}"), name)
