"""Models in buckets: brought here to be read, and put there."""

import shutil
import tempfile
from pathlib import Path

from ormo_server.mirror.addresses import is_address, local_path
from ormo_server.mirror.buckets import bucket_at
from ormo_server.mirror.copies import copies
from ormo_server.mirror.lease import LEASE, read_record
from ormo_server.store.checkpoints import LATEST, STATE_FILE
from ormo_server.store.files import SUMS_FILE, StoreError
from ormo_server.store.models import ModelFile


def fetched(address: str, room: Path | None = None) -> ModelFile:
    """The model that is at a path or in a bucket.

    Args:
        address: of a file, a Hugging Face folder, a checkpoint, a run's directory, or a mirror; of the last two it is
            the newest checkpoint's.
        room: a directory in which a copy from a bucket has room, as long as it is read; None for the system's.

    Raises:
        SettingsError: it is in a bucket, and the library for that is missing.
        StoreError: it is missing, damaged, or holds what is not served.
    """
    path = local_path(address)
    if not is_address(address) and not (path / LEASE).exists():
        return ModelFile.load(path / LATEST if (path / LATEST).exists() else path)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=room) as folder:
        return ModelFile.load(_brought(address, Path(folder, "model")), said=address)


def _brought(address: str, target: Path) -> Path:
    bucket = bucket_at(address)
    found = read_record(bucket)
    if found is not None:
        whole = [copy for copy in copies(bucket, found[0].lineage) if copy.whole]
        if not whole:
            raise StoreError(f"no model to start from: the mirror {address} has no whole checkpoint yet")
        names = {name: whole[-1].object_of(name) for name in whole[-1].files if _is_of_model(name)}
    else:
        names = {name: name for name in bucket.sizes() if _is_of_model(name)}
    if not names:
        above, _, name = address.rstrip("/").rpartition("/")
        bucket_at(above).download(name, target)
        return target
    target.mkdir()
    for name, object_name in names.items():
        bucket.download(object_name, target / name)
    return target


def _is_of_model(name: str) -> bool:
    # A checkpoint's state is not needed, and neither is whatever else a Hugging Face folder has.
    return name == SUMS_FILE or (name.endswith((".safetensors", ".json")) and "/" not in name and name != STATE_FILE)


def put_file(source: Path, address: str) -> None:
    """Copy a file to a path or into a bucket; it is there whole, or as it was before.

    Raises:
        SettingsError: it goes into a bucket, and the library for that is missing.
        StoreError: it can't be written there.
    """
    if is_address(address):
        above, _, name = address.rstrip("/").rpartition("/")
        bucket_at(above).upload(source, name)
        return
    target = local_path(address)
    aside = target.with_name(f".writing-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, aside)
        aside.replace(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StoreError(f"{target} can't be written ({error}): make room there or choose another --into") from error
