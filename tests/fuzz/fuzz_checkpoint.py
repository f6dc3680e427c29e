"""Whatever a checkpoint's files hold, it is read, or refused with an error that says which."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from torch import nn

from fuzz.script import Script
from ormo_protos.manifest import Manifest
from ormo_server.store import StoreError
from ormo_server.store.checkpoints import STATE_FILE, read_files, write_files
from ormo_server.store.files import SUMS_FILE
from ormo_server.store.models import DOCUMENT_FILE, MODEL_FILE
from store.building import checkpoint_of, reseal

NAMES = (DOCUMENT_FILE, STATE_FILE, MODEL_FILE, SUMS_FILE)


@cache
def written() -> dict[str, bytes]:
    """The files of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), checkpoint_of(nn.Linear(2, 1)))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def check(fuzzed: bytes) -> str:
    """Read it with one file replaced; returns how it ended."""
    script = Script(fuzzed)
    name = NAMES[script.number() % len(NAMES)]
    folder = Path(tempfile.mkdtemp())
    try:
        for each, content in written().items():
            (folder / each).write_bytes(content)
        (folder / name).write_bytes(script.rest())
        if name != SUMS_FILE:
            reseal(folder)
        checkpoint = read_files(folder)
        kinds = {"drained": bool, "clock_seconds": float, "settings": dict, "torch_version": str, "manifest": Manifest}
        assert all(isinstance(getattr(checkpoint, name), kind) for name, kind in kinds.items())
        assert isinstance(checkpoint.snapshot.fields, dict)
        return "read"
    except StoreError as error:
        if str(folder) not in str(error):
            raise
        return "refused"
    finally:
        shutil.rmtree(folder)


def seeds() -> Iterator[bytes]:
    """Each file as it is, and documents with parts of other kinds."""
    for at, name in enumerate(NAMES):
        yield bytes([at]) + written()[name]
    document = json.loads(written()[DOCUMENT_FILE])
    for key in document:
        for value in (None, [], {}, -1, "x"):
            yield b"\x00" + json.dumps(document | {key: value}).encode()
