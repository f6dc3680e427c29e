"""The generated parts of the README: run as a program it writes them anew."""

import importlib
import re
from pathlib import Path

from ormo_protos.settings import settings_table

README = Path(__file__).parents[1] / "README.md"
_TABLE = re.compile(r"(<!-- settings: (?P<module>[\w.]+):(?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with each settings table as its class gives it."""

    def table(match: re.Match[str]) -> str:
        settings = getattr(importlib.import_module(match["module"]), match["name"])
        return f"{match[1]}{settings_table(settings)}{match[4]}"

    return _TABLE.sub(table, text)


def example(name: str) -> str:
    """The Python code that follows a marker."""
    found = re.search(rf"<!-- {name} example -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
