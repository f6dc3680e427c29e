"""Who may write into a mirror: one writer at a time, by an object that is only ever replaced as it was read.

A writer renews it. What ends a lease is that nobody has renewed it for as long as it says, by the clock of whoever
watches: clocks of two machines are never compared. A writer that could not renew it in time copies nothing until it
has; one that finds another's lease there has lost the mirror for good. Should it write once more all the same, it does
so in its own folder, where the next writer's copies are not.
"""

import os
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ormo_server.mirror.buckets import Bucket, BucketError, ChangedError, Object
from ormo_server.mirror.identity import Writer
from ormo_server.store.files import StoreError

LEASE = "lease.json"
FORMAT_VERSION = 1
# How often it is renewed in the time after which it ends.
RENEWALS = 3


class HeldError(StoreError):
    """Another writer has the mirror.

    Attributes:
        seconds: after which it is free, if that writer is dead; 0 if it is known to live.
    """

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class LostError(HeldError):
    """Another writer has it that goes on from what this one wrote: it will not be ours again."""


class Record(BaseModel):
    """What the object says.

    Attributes:
        writer: whose it is.
        continues: the writers whose run this one goes on with, the last one first.
        holder: drawn by the process that wrote it, which knows its own writes by it.
        server: that process, for people.
        lease_seconds: it ends once it has not been renewed for so long.
        renewal: which one it is, so that no two are alike.
        released: the writer has ended in order.
        iteration: the last one that the writer is known to have had; it may be in no checkpoint.
        written_at: by the writer's clock, for people.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: int = FORMAT_VERSION
    writer: str
    continues: tuple[str, ...] = ()
    holder: str = ""
    server: str
    lease_seconds: float
    renewal: int = 0
    released: bool = False
    iteration: int = 0
    written_at: str = ""

    @property
    def lineage(self) -> tuple[str, ...]:
        """All writers of this run, the last one first."""
        return (self.writer, *self.continues)


def read_record(bucket: Bucket) -> tuple[Record, Object] | None:
    """What the lease says; None in a mirror that nobody has written to.

    Raises:
        BucketError: it can't be read.
        StoreError: it says what this server does not understand.
    """
    found = bucket.read(LEASE)
    if found is None:
        return None
    try:
        record = Record.model_validate_json(found.content)
    except ValidationError as error:
        raise StoreError(f"{bucket.address}/{LEASE} is malformed ({error.errors()[0]['msg']})") from error
    if record.format_version != FORMAT_VERSION:
        raise StoreError(
            f"{bucket.address}/{LEASE} has format version {record.format_version}, and this server reads "
            f"{FORMAT_VERSION}: use the server that wrote it"
        )
    return record, found


class Lease:
    """The right to write into a mirror.

    Args:
        bucket: of the mirror.
        writer: who asks for it.
        lease_seconds: without a renewal after which another may take it.
        clock: seconds that only go on.
    """

    def __init__(
        self, bucket: Bucket, writer: Writer, lease_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.writer = writer
        self.lease_seconds = lease_seconds
        self._bucket = bucket
        self._clock = clock
        self._holder = secrets.token_hex(8)
        self._server = f"process {os.getpid()} on {os.uname().nodename}"
        self._mine: tuple[Record, Any] | None = None
        self._renewed: float | None = None
        self._watched: tuple[Any, float] | None = None

    @property
    def held(self) -> bool:
        """Whether it is ours for certain, also if nothing was heard of the bucket since the last renewal."""
        return self._renewed is not None and self._clock() < self._renewed + self.lease_seconds

    @property
    def taken(self) -> bool:
        """Whether it was ours at any time."""
        return self._mine is not None

    def take(self) -> Record | None:
        """Take it, if it is nobody's, our own directory's, given back, or was not renewed for as long as it says.

        Returns:
            What it said before; None in a mirror that nobody has written to.

        Raises:
            HeldError: it is another's, as far as is known; ask again. The sentence says whose.
            LostError: that other one goes on with our run.
            BucketError: nothing is known.
        """
        found = read_record(self._bucket)
        if found is None:
            self._write(0, 0, None)
            return None
        record, there = found
        self._refuse_if_held(record, there)
        ours = record.writer in (self.writer.name, *self.writer.continues)
        self._write(record.renewal, record.iteration if ours else 0, there.version)
        return record

    def _refuse_if_held(self, record: Record, there: Object) -> None:
        if self.writer.name in record.continues:
            raise LostError(
                f"{_whose(self._bucket, record)} has gone on with the run of this directory: to go on from there, stop "
                "it and start with an empty --directory; to go on from here, choose another --mirror"
            )
        if record.released or record.writer in (self.writer.name, self.writer.before):
            return
        lives = self._watched is not None and self._watched[0] != there.version
        if self._watched is None or lives:
            self._watched = there.version, self._clock()
        left = self._watched[1] + record.lease_seconds - self._clock()
        if left > 0:
            raise HeldError(
                f"{_whose(self._bucket, record)} writes there: stop it, or choose another --mirror",
                0.0 if lives else left,
            )

    def renew(self, iteration: int | None, *, released: bool = False) -> None:
        """Say that we live, and what we have; None for as before.

        Raises:
            LostError: another has taken it.
            BucketError: it can't be said.
        """
        assert self._mine is not None
        record, version = self._mine
        self._write(record.renewal, record.iteration if iteration is None else iteration, version, released=released)

    def _write(self, renewal: int, iteration: int, version: Any, *, released: bool = False) -> None:
        record = Record(
            writer=self.writer.name,
            continues=self.writer.continues,
            holder=self._holder,
            server=self._server,
            lease_seconds=self.lease_seconds,
            renewal=renewal + 1,
            released=released,
            iteration=iteration,
            written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        began = self._clock()  # from here on, whatever the bucket takes to answer
        content = record.model_dump_json(indent=1).encode()
        self._mine = record, self._replace(content, version)
        self._renewed = None if released else began

    def _replace(self, content: bytes, version: Any) -> Any:
        try:
            return self._bucket.replace(LEASE, content, version)
        except ChangedError:
            version = self._version_if_ours()
        try:
            return self._bucket.replace(LEASE, content, version)
        except ChangedError as error:
            raise BucketError(f"{self._bucket.address}/{LEASE} changes while it is read") from error

    def _version_if_ours(self) -> Any:
        """The version there, if it was we who wrote it: the answer to that was lost; None if somebody removed it."""
        found = read_record(self._bucket)
        if found is None:
            return None
        record, there = found
        if record.holder == self._holder:
            return there.version
        self._renewed = None
        if self._mine is None:  # somebody was faster
            raise HeldError(f"{_whose(self._bucket, record)} has just begun to write there: choose another --mirror")
        raise LostError(f"{_whose(self._bucket, record)} has taken it over: stop one of the two")


def _whose(bucket: Bucket, record: Record) -> str:
    return (
        f"{bucket.address} is the mirror of another server: {record.server}, which had iteration {record.iteration} at "
        f"{record.written_at},"
    )
