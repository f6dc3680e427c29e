"""Buckets of S3, Google and Azure, by obstore: it alone of the libraries has conditional puts for all three.

It also brings all of them in one wheel without dependencies, and holds no lock of Python's while it waits, so that
copying does not slow training down.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from ormo_server.core.errors import SettingsError
from ormo_server.mirror.buckets import BucketError, ChangedError, Object
from ormo_server.store.files import sync

try:
    import obstore
    from obstore import exceptions
    from obstore.store import from_url
except ImportError as error:
    raise SettingsError(
        "a bucket needs the library obstore, which is not installed: pip install 'ormo-parameter-server[buckets]'"
    ) from error

# Whoever calls tries again, after growing pauses; here only what a lost packet or a busy server needs.
_RETRIES = 2
_RETRY_SECONDS = 20
_CONNECT_SECONDS = 10
# Of one request, which carries at most a part; slower than 140 kB/s is as good as away.
_REQUEST_SECONDS = 60
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 2
# S3 takes 10,000 parts of one object.
_MOST_PARTS = 9_000
_DENIED = ("401 Unauthorized", "403 Forbidden")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class ObjectStore:
    """A bucket. Credentials are as obstore finds them: in the environment, of the machine, or of the pod.

    Args:
        address: such as `s3://bucket/folder`.

    Raises:
        SettingsError: the address can't be one, or settings of the environment contradict each other.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
        try:
            self._store = from_url(
                self.address,
                client_options={
                    "timeout": f"{_REQUEST_SECONDS}s",
                    "connect_timeout": f"{_CONNECT_SECONDS}s",
                    **({"allow_http": True} if plain else {}),
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
                **_aws_files(self.address),
            )
        except (exceptions.BaseError, ValueError) as error:
            raise SettingsError(f"{self.address} can't be used as a bucket: {_reason(error)}") from error

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each object by its name."""
        with self._using("listed"):
            found = obstore.list(self._store, below or None)
            return {each["path"]: each["size"] for batch in found for each in batch}

    def read(self, name: str) -> Object | None:
        """A small object; None if there is none, in a bucket that is there."""
        with self._using("read", name):
            try:
                got = obstore.get(self._store, name)
                return Object(bytes(got.bytes()), _version(got.meta))
            except FileNotFoundError:
                # Which a bucket that is not there says too; to list it is an error then.
                obstore.list(self._store, name).collect()
                return None

    def replace(self, name: str, content: bytes, over: Any) -> Any:
        """Write an object where the one of version `over` is, or none where that is None; returns its version."""
        with self._using("written", name):
            try:
                return _version(obstore.put(self._store, name, content, mode="create" if over is None else over))
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
                raise ChangedError from error
            except FileNotFoundError as error:
                if over is None or "NoSuchBucket" in str(error):
                    raise
                raise ChangedError from error  # somebody has removed it

    def upload(self, source: Path, name: str) -> None:
        """Copy a file there; it appears once it is whole."""
        part = max(_PART_BYTES, source.stat().st_size // _MOST_PARTS)
        with self._using("written", name):
            obstore.put(self._store, name, source, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)

    def download(self, name: str, target: Path) -> None:
        """Copy an object into a file, part by part, so that a slow line ends no request."""
        with self._using("read", name), target.open("wb") as file:
            size = obstore.head(self._store, name)["size"]
            for start in range(0, size, _PART_BYTES):
                end = min(start + _PART_BYTES, size)
                file.write(obstore.get_range(self._store, name, start=start, end=end))
        sync(target)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, one after the other: in the order of the names."""
        with self._using("written"):
            for name in names:
                try:
                    obstore.delete(self._store, name)
                except FileNotFoundError:
                    continue

    @contextmanager
    def _using(self, done: str, name: str = "") -> Iterator[None]:
        what = f"{self.address}/{name}" if name else self.address
        try:
            yield
        except (exceptions.BaseError, OSError) as error:
            why = f"{what} can't be {done}: {_reason(error)}"
            if any(status in str(error) for status in _DENIED):  # to list has no exception of its own for it
                why += ". Access is denied: the credentials in force need to list, get, put and delete there"
            raise BucketError(why) from error


def _version(about: Any) -> dict[str, str]:
    return {key: about[key] for key in ("e_tag", "version") if about.get(key) is not None}


def _aws_files(address: str) -> dict[str, Any]:
    """Credentials of the files that the AWS command line writes, which obstore leaves to boto3."""
    named = os.environ.get("AWS_PROFILE")
    written = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser().exists()
    if not address.startswith("s3") or not (named or written) or os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        if not named:
            return {}
        raise SettingsError(
            f"AWS_PROFILE is {named!r}, and to read it needs the library boto3: pip install boto3, or give "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except (BotoCoreError, ValueError) as error:
        raise SettingsError(f"the credentials for {address} can't be read: {error}") from error


def _reason(error: BaseException) -> str:
    """The sentence in what the library says, which may go on with XML and its own structures for pages."""
    text = str(error)
    said = re.search(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)", text)
    if said:
        return f"{said[1]}: {said[2].rstrip('.')}"
    first = text.partition("\n")[0].strip()
    return first.rpartition(" - ")[2].rstrip(": ")[:300]
