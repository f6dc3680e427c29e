"""The audit of dependencies finds what it is told of, and never calls sound what was not looked up."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import audit

SOUND = {"name": "grpcio", "version": "1.85.1", "vulns": []}
FAULTY = {"name": "pyyaml", "version": "5.3", "vulns": [{"id": "PYSEC-2021-142", "fix_versions": ["5.4"]}]}
HOPELESS = {"name": "old", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found"}


def answer(*found: dict[str, Any]) -> str:
    return json.dumps({"dependencies": found, "fixes": []})


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
    text, ended = audit.outcome(answer(*found), "", code)
    assert ended == code
    assert re.search(sentence, text), text


TRACEBACK = "Traceback (most recent call last):\n"
# How the log of pip-audit 2.10.1 ends then.
UNREACHABLE = {
    "no connection": f"{TRACEBACK}requests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org')",
    "a proxy that is down": f"{TRACEBACK}requests.exceptions.ProxyError: HTTPSConnectionPool(host='pypi.org')",
    "no answer in time": f"{TRACEBACK}requests.exceptions.ReadTimeout: HTTPSConnectionPool(host='pypi.org')",
    "no connection in time": "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed\n"
    "ERROR:pip_audit._cli:Tip: your network may be blocking this service. Try another service with `-s SERVICE`\n",
    "an outage": f"{TRACEBACK}requests.exceptions.HTTPError: 503 Server Error: down for url: https://pypi.org/pypi\n\n"
    f"{TRACEBACK}pip_audit._service.interface.ServiceError\n",
}
MISTAKES = {
    "no such file": "ERROR:pip_audit._cli:invalid requirements input: no-such-file.txt\n",
    "no pip-audit": "/usr/bin/python: No module named pip_audit\n",
    "what is not pinned": "ERROR:pip_audit._cli:requirement grpcio is not pinned to an exact version: grpcio>=1\n",
    "what is no requirement": "ERROR:pip_audit._cli:requirement file a.txt contains invalid specifier\n    ^\n",
    "a request that is refused": f"{TRACEBACK}requests.exceptions.HTTPError: 403 Client Error: no\n\n"
    f"{TRACEBACK}pip_audit._service.interface.ServiceError\n",
    "an error after another": f"{TRACEBACK}requests.exceptions.ConnectionError: a\n\n{TRACEBACK}KeyError: 'b'\n",
    "silence": "",
}


@pytest.mark.parametrize("what", UNREACHABLE)
def test_only_a_database_that_can_not_be_reached_passes_and_says_so(what: str) -> None:
    text, code = audit.outcome("", UNREACHABLE[what], 1)
    assert code == 0
    assert text.startswith("NOT LOOKED UP, the database can't be reached: ")


@pytest.mark.parametrize("what", MISTAKES)
def test_whatever_else_keeps_it_from_an_answer_fails_and_is_shown(what: str) -> None:
    text, code = audit.outcome("", MISTAKES[what], 1)
    assert code == 2
    assert "NOT LOOKED UP" not in text
    assert text.endswith(MISTAKES[what])


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        (answer(), 0),
        (answer(SOUND), 1),
        (answer(FAULTY), 0),
        ("{}", 0),
        ("[]", 1),
        (answer(SOUND)[:-5], 1),
    ],
    ids=["nothing pinned", "sound and failed", "faulty and fine", "no list", "no object", "cut off"],
)
def test_an_answer_that_can_not_be_is_none(said: str, ended: int) -> None:
    assert audit.outcome(said, "", ended)[1] == 2


def test_a_file_that_is_not_there_fails_whether_or_not_pip_audit_is(tmp_path: Path) -> None:
    command = [sys.executable, audit.__file__, "no-such-file.txt"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2
    assert "pip-audit gave no answer" in run.stdout
    assert "no-such-file.txt" in run.stdout or "No module named pip_audit" in run.stdout


@pytest.mark.parametrize("arguments", [[], ["a.txt", "b.txt"]])
def test_one_file_is_expected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(arguments) == 2
    assert "expected one file" in capsys.readouterr().err
