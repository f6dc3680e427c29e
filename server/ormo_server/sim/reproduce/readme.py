"""Where a text file shows the results of a comparison, between two markers."""

from pathlib import Path

from ormo_runtime.settings import UsageError


def insert(path: Path, name: str, table: str) -> None:
    """Put a table between the markers of that name, instead of what is there.

    Raises:
        UsageError: the file or the markers are missing.
    """
    before, after = _around(path, name)
    aside = path.with_name(path.name + ".part")
    aside.write_text(f"{before}\n{table.strip()}\n{after}", encoding="utf-8")
    aside.chmod(path.stat().st_mode)
    aside.replace(path)


def check(path: Path, name: str) -> None:
    """See before hours of work that the markers are there.

    Raises:
        UsageError: the file or the markers are missing.
    """
    _around(path, name)


def _around(path: Path, name: str) -> tuple[str, str]:
    start, end = f"<!-- results: {name} -->", f"<!-- end of results: {name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}") from error
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise UsageError(f"{path} does not say where the results go: put the lines {start} and {end} into it")
    return before + start, end + after
