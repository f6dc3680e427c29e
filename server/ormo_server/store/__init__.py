"""What a run keeps on disk: its checkpoints, and the model file that it may start from.

directory/
    checkpoint-00000007-iteration-1200/     written aside, then renamed; the first number is the order of writing
        model.safetensors                   the model's state_dict, for anybody: `load_state_dict(..., strict=True)`
        state.safetensors                   all tensors of the core's state
        checkpoint.json                     everything else
        SHA256SUMS                          of the three; `sha256sum --check SHA256SUMS` verifies them by hand
    latest -> checkpoint-00000007-iteration-1200
"""

from ormo_server.store.checkpoints import Checkpoint, CheckpointStore, Found, unsound
from ormo_server.store.files import DirectoryLock, NotFinite, StoreError, size_bytes
from ormo_server.store.models import FlatModel, ModelFile, buffers_of, unsound_tensors

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "DirectoryLock",
    "FlatModel",
    "Found",
    "ModelFile",
    "NotFinite",
    "StoreError",
    "buffers_of",
    "size_bytes",
    "unsound",
    "unsound_tensors",
]
