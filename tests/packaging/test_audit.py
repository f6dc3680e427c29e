"""The audit of dependencies finds what it is told of, and never calls sound what was not looked up."""

import json
import re
from typing import Any

import pytest

from audit import report_of, words

SOUND = {"name": "grpcio", "version": "1.85.1", "vulns": []}
FAULTY = {"name": "pyyaml", "version": "5.3", "vulns": [{"id": "PYSEC-2021-142", "fix_versions": ["5.4"]}]}
HOPELESS = {"name": "old", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("found", "sentence", "code"),
    [
        ([SOUND, FAULTY], "pyyaml 5.3: PYSEC-2021-142, fixed in 5.4\n1 packages have no known", 1),
        ([HOPELESS], "old 1: PYSEC-1, fixed in no version", 1),
        ([SOUND], "1 packages have no known vulnerability", 0),
        ([SOUND, UNKNOWN], "1 packages have no known vulnerability\nNOT LOOKED UP, .*: torch", 0),
        ([UNKNOWN, FAULTY], "(?s)PYSEC.*NOT LOOKED UP", 1),
    ],
)
def test_what_was_found_is_said_and_decides(found: list[dict[str, Any]], sentence: str, code: int) -> None:
    text, ended = words(report_of(json.dumps({"dependencies": found, "fixes": []})))
    assert ended == code
    assert re.search(sentence, text), text
