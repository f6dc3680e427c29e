"""torch.distributed.rpc with this project's settings of the allocator, in server and workers."""

from benchmarks.round_trips.contenders import torch_rpc
from benchmarks.round_trips.place import Place, RoundTrip
from ormo_runtime.process import keep_freed_memory


def serve(place: Place) -> None:
    """Serve until killed."""
    keep_freed_memory()
    torch_rpc.serve(place)


def connect(place: Place) -> RoundTrip:
    """As without the settings."""
    keep_freed_memory()
    return torch_rpc.connect(place)
