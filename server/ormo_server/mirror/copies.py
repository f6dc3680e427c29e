"""Copies of checkpoints in a mirror: put there file by file, found again, the old ones removed."""

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ormo_server.mirror.buckets import Bucket, BucketError
from ormo_server.store.checkpoints import CHECKPOINT_FILES, NAME, Checkpoint, Found, read_files, serial_of
from ormo_server.store.files import SUMS_FILE, StoreError, make_directory

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copy:
    """A checkpoint in a mirror.

    Attributes:
        writer: whose folder it is in.
        name: as on the disk.
        files: which of it are there, with their sizes in bytes.
    """

    writer: str
    name: str
    files: dict[str, int]

    @property
    def whole(self) -> bool:
        """Whether its copying came to its end."""
        return SUMS_FILE in self.files

    @property
    def serial(self) -> int:
        """Its number in the order of writing."""
        return serial_of(self.name)

    def object_of(self, file: str) -> str:
        """The name of one of its files in the bucket."""
        return f"{self.writer}/{self.name}/{file}"


def copies(bucket: Bucket, lineage: Sequence[str] | None = None) -> list[Copy]:
    """The checkpoints of these writers, oldest first; of all writers, by name, if none are given.

    Args:
        bucket: of the mirror.
        lineage: names of writers, the last one first.

    Raises:
        BucketError: it can't be listed.
    """
    found: dict[tuple[str, str], Copy] = {}
    for name, size in bucket.sizes().items():
        writer, _, (checkpoint, _, file) = _parts(name)
        if NAME.fullmatch(checkpoint) and file and (lineage is None or writer in lineage):
            found.setdefault((writer, checkpoint), Copy(writer, checkpoint, {})).files[file] = size
    rank = {writer: -place for place, writer in enumerate(lineage or ())}
    return sorted(found.values(), key=lambda copy: (rank.get(copy.writer, 0), copy.writer, copy.serial))


def _parts(name: str) -> tuple[str, str, tuple[str, str, str]]:
    writer, slash, rest = name.partition("/")
    return writer, slash, rest.partition("/")


def copy_in(bucket: Bucket, writer: str, checkpoint: Path, refuse_if_not_ours: Callable[[], None]) -> None:
    """Copy a checkpoint there; what is there of it already is left as it is, so that this can be asked again.

    Args:
        bucket: of the mirror.
        writer: whose copy it is.
        checkpoint: its directory on the disk.
        refuse_if_not_ours: asked before each file; raises a BucketError.

    Raises:
        BucketError: something of it could not be copied.
        StoreError: it has gone from the disk meanwhile.
    """
    below = f"{writer}/{checkpoint.name}"
    there = bucket.sizes(below)
    for file in (*CHECKPOINT_FILES, SUMS_FILE):
        source, name = checkpoint / file, f"{below}/{file}"
        try:
            refuse_if_not_ours()
            size = source.stat().st_size
            if there.get(name) != size:
                bucket.upload(source, name)
        except FileNotFoundError as error:
            raise StoreError(f"{source} is not there any more, so {checkpoint.name} can't be copied") from error


def prune(bucket: Bucket, lineage: Sequence[str], keep: int) -> tuple[str, ...]:
    """Remove all but the last whole copies of a run, and what is left of those that were begun before them.

    Args:
        bucket: of the mirror.
        lineage: the writers of the run, the last one first; copies of other runs are left alone.
        keep: how many stay.

    Returns:
        The writers before the last one of whom something is left.

    Raises:
        BucketError: they can't be listed or removed.
    """
    there = copies(bucket, lineage)
    whole = [copy for copy in there if copy.whole]
    stay = there[there.index(whole[-keep:][0]) :] if whole else there
    for copy in there:
        if copy not in stay or not (copy.whole or copy is there[-1]):
            # What says that it is whole goes first.
            files = sorted(copy.files, key=lambda file: file != SUMS_FILE)
            bucket.remove([copy.object_of(file) for file in files])
    left = {copy.writer for copy in stay}
    return tuple(writer for writer in lineage[1:] if writer in left)


def fetch_newest(
    bucket: Bucket,
    lineage: Sequence[str],
    into: Path,
    refuse: Callable[[Checkpoint], object] = lambda _: None,
) -> tuple[Copy, Found] | None:
    """Bring the newest whole copy of a run here, verified by its checksums.

    Args:
        bucket: of the mirror.
        lineage: the writers of the run, the last one first.
        into: a folder of which nothing is kept.
        refuse: raises a StoreError for a checkpoint that the run must not go on with.

    Returns:
        The copy, and what it holds, in `into`; None if there is none of any kind.

    Raises:
        BucketError: it can't be read: nothing is known.
        StoreError: none that is there is whole.
    """
    there = copies(bucket, lineage)
    failures: list[str] = []
    for copy in reversed(there):
        if not copy.whole:
            failures.append(f"{copy.name} is there in part: its copying was cut off")
            continue
        try:
            path = _fetch(bucket, copy, into)
            # Gradients may have been applied after it, and no journal that it names is here.
            checkpoint = replace(read_files(path), drained=False, journal_log=None)
            refuse(checkpoint)
        except BucketError:
            raise
        except StoreError as error:
            failures.append(str(error))
            continue
        _tell(failures, f"{copy.name} is used instead")
        return copy, Found(path, checkpoint, skipped=1)
    if failures:
        raise StoreError(
            f"none of the checkpoints of this run in {bucket.address} is whole (the newest: {failures[0]}): bring one "
            "back from a backup, or begin a new run with --fresh"
        )
    return None


def _tell(failures: Iterable[str], instead: str) -> None:
    for failure in failures:
        _LOG.error("in the mirror: %s; %s", failure, instead)


def _fetch(bucket: Bucket, copy: Copy, into: Path) -> Path:
    target = into / copy.name
    try:
        shutil.rmtree(into, ignore_errors=True)
        make_directory(target)
        for file in (*CHECKPOINT_FILES, SUMS_FILE):
            if file in copy.files:  # the model's file is a copy for people
                bucket.download(copy.object_of(file), target / file)
    except OSError as error:
        raise BucketError(f"{target} can't be written ({error}): make room there or mend the disk") from error
    return target
