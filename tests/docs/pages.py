"""The pages that people read, as tests read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "deploy/README.md")),
    ROOT / "deploy" / "RUNBOOK.md",
    *sorted(DOCS.rglob("*.md")),
]


def text_of(name: str) -> str:
    """A page of docs/, by its path there."""
    return (DOCS / name).read_text(encoding="utf-8")


def all_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def example(page: str, name: str) -> str:
    """The block that follows a marker."""
    found = re.search(rf"<!-- {name} example -->\n```\w+\n(.*?)```", text_of(page), re.DOTALL)
    assert found is not None
    return found[1]
