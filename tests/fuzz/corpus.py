"""Inputs that found something once: files in `found/`, in a folder for each target, named after what they are."""

from pathlib import Path

FOLDER = Path(__file__).parent / "found"


def found(target: str) -> dict[str, bytes]:
    """All inputs that are kept for a target, by name."""
    return {path.name: path.read_bytes() for path in sorted((FOLDER / target).glob("*"))}
