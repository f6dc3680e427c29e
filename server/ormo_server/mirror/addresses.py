"""Paths, and addresses of buckets."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

# Of obstore, and how they are spelt elsewhere.
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")


def is_address(address: str) -> bool:
    """Whether this is the address of a bucket, and not the path of a file or folder."""
    return "://" in address and not address.startswith("file://")


def local_path(address: str) -> Path:
    """The path that is meant by a path or by `file://...`."""
    return Path(unquote(urlsplit(address).path)) if address.startswith("file://") else Path(address)


def check_address(address: str) -> None:
    """Nothing, if it can be an address.

    Raises:
        ValueError: a scheme that is not known.
    """
    scheme = urlsplit(address).scheme
    if is_address(address) and scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "az"))
        raise ValueError(f"{address!r} begins with {scheme}://: expected {known}, file:// or the path of a folder")
