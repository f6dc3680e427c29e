"""A program's log: lines for people, or one JSON object each that names what it is about."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from typing import Literal

import pytest

from ormo_runtime import logs
from ormo_runtime.logs import FewOf, FewOfEach, Fields, formatter, printable


def record(message: str, *values: object, **fields: object) -> logging.LogRecord:
    logger = logging.getLogger("ormo_server.service.engine")
    return logger.makeRecord(logger.name, logging.WARNING, "file.py", 1, message, values, None, extra=dict(fields))


def test_a_line_of_json_has_time_level_logger_message_and_what_it_is_about() -> None:
    line = formatter("json").format(record("worker %s left", "w\n1", worker="w\n1", iteration=7, loss=math.nan))
    assert "\n" not in line
    told = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
    assert told == {
        "level": "warning",
        "logger": "ormo_server.service.engine",
        "message": "worker w\n1 left",
        "worker": "w\n1",
        "iteration": 7,
        "loss": None,
    }


def test_a_program_s_own_fields_are_in_every_line_unless_a_record_has_its_own() -> None:
    about = formatter("json", Fields(worker="me"))
    assert json.loads(about.format(record("so")))["worker"] == "me"
    assert json.loads(about.format(record("so", worker="other")))["worker"] == "other"


def test_text_leaves_fields_to_the_message() -> None:
    line = formatter("text").format(record("worker %s left", "w1", worker="w1", iteration=7))
    assert line.endswith(" WARNING worker w1 left")


def test_nothing_that_moves_the_cursor_or_hides_is_shown_as_it_is() -> None:
    shown = "a\\x1b[2Jb\\nc\\x07\\u202ed é 木\\r\\u200b\\U000e0041"
    assert printable("a\x1b[2Jb\nc\x07\u202ed é 木\r\u200b\U000e0041") == shown
    assert printable(ValueError("an error\x00")) == "an error\\x00"


EVIL = "\x1b]0;owned\x07\x1b[2J\r\n2026-01-01 00:00:00 ERROR   a fake line\u202e"


def test_a_record_is_one_line_whatever_it_quotes() -> None:
    line = formatter("text").format(record("worker %s left", EVIL))
    assert line.endswith(
        r" WARNING worker \x1b]0;owned\x07\x1b[2J\r\n2026-01-01 00:00:00 ERROR   a fake line\u202e left"
    )
    assert line.isprintable()


def test_an_exception_in_the_log_has_lines_of_its_own_that_look_like_no_record() -> None:
    try:
        raise ValueError(EVIL)
    except ValueError:
        failed = logging.makeLogRecord({"msg": "it failed", "exc_info": sys.exc_info(), "stack_info": EVIL})
    first, *others = formatter("text").format(failed).split("\n")
    assert first.endswith("it failed")
    assert others[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and line.isprintable() for line in others)
    assert sum("a fake line" in line for line in others) == 2


@pytest.mark.parametrize("form", ["text", "json"])
def test_last_words_are_one_line_whatever_they_quote(form: Literal["text", "json"]) -> None:
    code = (
        f"from ormo_runtime import logs; logs.set_up('info', {form!r}); logs.last_words('ormo-x', {EVIL!r}, {form!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.decode().removesuffix("\n").isprintable()


@pytest.mark.parametrize(("form", "starts"), [("text", "ormo-x: no such"), ("json", "{")])
def test_last_words_are_a_sentence_or_a_record(form: str, starts: str) -> None:
    code = (
        f"from ormo_runtime import logs; logs.set_up('info', {form!r}); logs.last_words('ormo-x', 'no such', {form!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.startswith(starts)


def test_in_json_warnings_and_uncaught_exceptions_are_records_too() -> None:
    code = """
import threading, warnings
from ormo_runtime import logs
logs.set_up("info", "json", logs.Fields(worker="me"))
warnings.warn("old")
thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()
raise ValueError("spoilt")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    warned, in_thread, uncaught = (json.loads(line) for line in done.stderr.splitlines())
    assert "UserWarning: old" in warned["message"]
    assert "uncaught ZeroDivisionError" in in_thread["message"]
    assert "uncaught ValueError: spoilt" in uncaught["message"]
    assert "Traceback" in uncaught["exception"]
    assert {told["worker"] for told in (warned, in_thread, uncaught)} == {"me"}


def test_a_librarys_lines_are_few_however_many_there_would_be() -> None:
    few, shown = FewOf("grpc", count=2, seconds=10.0), []
    for name, created in [
        *[("grpc._cython", 100.0 + second / 100) for second in range(500)],
        ("ormo", 104.0),
        ("grpc", 111.0),
    ]:
        line = record("came %d", 7)
        line.name, line.created = name, created
        if few.filter(line):
            shown.append((name, line.getMessage()))
    assert shown == [
        ("grpc._cython", "came 7"),
        ("grpc._cython", "came 7"),
        ("ormo", "came 7"),
        ("grpc", "came 7 (498 more lines like this before it were left out)"),
    ]


def test_lines_from_one_place_in_the_code_are_few_and_those_for_debugging_all() -> None:
    few, shown = FewOfEach(count=2, seconds=10.0), []
    for line_number, level, created in [
        *[(1, logging.INFO, 100.0 + second / 100) for second in range(500)],
        *[(2, logging.DEBUG, 104.0)] * 5,
        (3, logging.INFO, 104.0),
        (1, logging.INFO, 111.0),
    ]:
        line = record("came %d", line_number)
        line.lineno, line.levelno, line.created = line_number, level, created
        if few.filter(line):
            shown.append(line.getMessage())
    assert shown == [
        *["came 1"] * 2,
        *["came 2"] * 5,
        "came 3",
        "came 1 (498 more lines like this before it were left out)",
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_full_stderr_did_not_take_is_told_in_a_line_like_any_other(form: str) -> None:
    reader, writer = os.pipe()
    code = f"""
import logging, os
from ormo_runtime import logs
logs.set_up("info", {form!r})
for number in range(2000):
    logging.getLogger("x").debug("")  # not shown, so not counted
    getattr(logging.getLogger("x"), ("info", "warning")[number % 2])("n" * 100)
    logs.FewOfEach.filter = lambda *_: True
print("full", flush=True)
input()
logging.getLogger("x").info("again")
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": writer, "text": True}
    with os.fdopen(reader, encoding="utf-8") as stderr, subprocess.Popen(command, **pipes) as process:
        os.close(writer)
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "full\n"  # nobody has read its stderr
        kept = os.read(reader, 1 << 20).decode().count("\n")
        process.stdin.write("\n")
        process.stdin.flush()
        told = stderr.read().splitlines()
    assert f"stderr was blocked: {2000 - kept} lines were left out" in told[-2]
    assert "again" in told[-1]
    assert [line[:1] for line in told[-2:]] == (["{", "{"] if form == "json" else ["2", "2"])


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_is_announced_is_read_back_whatever_its_form(
    form: logs.LogFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = {"address": "127.0.0.1:5", "metrics": ""}
    logs.announce("serving", facts, form)
    assert logs.announced(capfd.readouterr().out) == facts


def test_numbers_are_rounded_in_text_and_whole_in_json(capfd: pytest.CaptureFixture[str]) -> None:
    facts = {"iteration": 7, "loss": 2 / 3, "accuracy": math.nan}
    logs.announce("evaluation", facts, "text")
    text = capfd.readouterr().out
    assert text == "evaluation iteration=7 loss=0.6667 accuracy=nan\n"
    assert logs.announced(text) == {"iteration": "7", "loss": "0.6667", "accuracy": "nan"}
    logs.announce("evaluation", facts, "json")
    line = capfd.readouterr().out
    said = json.loads(line)
    assert (said["message"], said["iteration"], said["loss"], said["accuracy"]) == ("evaluation", 7, 2 / 3, None)
    assert logs.announced(line) == {"iteration": "7", "loss": str(2 / 3), "accuracy": "nan"}


@pytest.mark.parametrize("line", ["", "serving\n", "{ what?\n", "what else is said\n"])
def test_other_lines_announce_nothing(line: str) -> None:
    assert logs.announced(line) == {}
