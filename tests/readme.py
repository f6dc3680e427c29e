"""The generated parts of the README: run as a program it writes them anew."""

import importlib
import re
from pathlib import Path

from ormo_protos.settings import settings_table
from ormo_server.core.method import PRESETS
from ormo_server.core.rules import UPDATE_RULES

README = Path(__file__).parents[1] / "README.md"
_TABLE = re.compile(
    r"(?P<head><!-- (?P<own>own )?settings: (?P<module>[\w.]+):(?P<name>\w+) -->\n).*?(?P<end>\n<!-- end -->)",
    re.DOTALL,
)
_METHODS = re.compile(r"(?P<head><!-- methods -->\n).*?(?P<end>\n<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with the table of methods, and each settings table, as the code gives them."""

    def table(match: re.Match[str]) -> str:
        settings = getattr(importlib.import_module(match["module"]), match["name"])
        # A blank line on both sides: inside <details> Markdown needs it.
        return f"{match['head']}\n{settings_table(settings, own=match['own'] is not None)}{match['end']}"

    return _METHODS.sub(lambda match: f"{match['head']}{methods_table()}{match['end']}", _TABLE.sub(table, text))


def methods_table() -> str:
    """A Markdown table of the presets: their choices, and what the update rule keeps."""
    rows = ["| preset | update rule | step scale | scheduler | keeps besides `w` |", "| --- | --- | --- | --- | --- |"]
    for method in PRESETS.values():
        rule = UPDATE_RULES[method.rule]
        kept = f"{rule.vectors_per_slot} per slot" if rule.vectors_per_slot else f"{rule.vectors_per_run}"
        discards = f", discards from {method.discard_buckets}K on" if method.discard_buckets else ""
        rows.append(f"| `{method.name}` | {method.rule}{discards} | {method.scale} | {method.scheduler} | {kept} |")
    return "\n".join(rows) + "\n"


def example(name: str) -> str:
    """The Python code that follows a marker."""
    found = re.search(rf"<!-- {name} example -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
