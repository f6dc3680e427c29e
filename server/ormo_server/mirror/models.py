"""Models in buckets: brought here to be read, and put there."""

import shutil
import tempfile
from pathlib import Path

from ormo_server.mirror.addresses import is_address, local_path
from ormo_server.mirror.buckets import bucket_at
from ormo_server.store.checkpoints import STATE_FILE
from ormo_server.store.files import SUMS_FILE, StoreError
from ormo_server.store.models import ModelFile


def fetched(address: str, room: Path) -> ModelFile:
    """The model that is at a path or in a bucket.

    Args:
        address: of a file, a Hugging Face folder or a checkpoint.
        room: a directory in which a copy from a bucket has room, as long as it is read.

    Raises:
        SettingsError: it is in a bucket, and the library for that is missing.
        StoreError: it is missing, damaged, or holds what is not served.
    """
    if not is_address(address):
        return ModelFile.load(local_path(address))
    above, _, name = address.rstrip("/").rpartition("/")
    bucket = bucket_at(above)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=room) as folder:
        below = [file for file in bucket.sizes(name) if _is_of_model(file.removeprefix(f"{name}/"))]
        for file in below or [name]:
            target = Path(folder, file)
            target.parent.mkdir(exist_ok=True)
            bucket.download(file, target)
        return ModelFile.load(Path(folder, name), said=address)


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
