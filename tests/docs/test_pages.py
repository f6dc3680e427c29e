"""The pages hold together: they are short enough, lead somewhere, and say what the code says."""

import re
from pathlib import Path

import pytest
import yaml

from docs.pages import DOCS, PAGES, README, ROOT
from ormo_runtime.settings_loader import ALL_SETTINGS
from reference_pages import SETTINGS, pages

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def test_the_readme_stays_two_screens_long() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    assert len(text.encode()) <= 10 * 1024


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_what_is_generated_is_what_the_code_gives(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == pages()[page], "run `make reference`"


def test_every_setting_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    assert len(SETTINGS) == 13
    assert [name for name in ALL_SETTINGS if f"`--{name.replace('_', '-')}`" not in text] == []


def anchors(page: Path) -> set[str]:
    """As the repository's host makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for path, anchor in _LINK.findall(text):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def paths_in(text: str) -> list[str]:
    """Files of this repository that a text names."""
    return re.findall(r"`((?:protos|server|worker|tests|deploy|docs)/[\w./-]+\.\w+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_are_there(page: Path) -> None:
    assert [path for path in paths_in(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()] == []


def test_files_that_are_not_there_are_found() -> None:
    assert paths_in("see `server/nowhere.py`, and `server/`") == ["server/nowhere.py"]


def test_links_to_nothing_are_found() -> None:
    text = (
        "[a](docs/none.md) [b](docs/training.md#none) [c](#none) [d](docs/training.md#tasks) [e](https://none.example)"
    )
    assert broken_links(README, text) == ["docs/none.md#", "docs/training.md#none", "#none"]


def test_alerts_lead_to_their_paragraph_of_the_runbook() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml").read_text())["groups"]
    links = [rule["annotations"]["runbook"] for group in groups for rule in group["rules"]]
    assert len(links) > 15
    assert [link for link in links if broken_links(README, f"[x]({link})")] == []


def test_every_page_of_docs_can_be_reached_from_the_start_page() -> None:
    linked = {path for path, _ in _LINK.findall((DOCS / "index.md").read_text(encoding="utf-8"))}
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"index.md"} <= linked


def test_every_page_is_in_the_sites_contents() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).as_posix() not in site] == []
