"""A stream that takes no more stops nobody who writes to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ormo_runtime.process import PatientStream

LINE = "x" * 99 + "\n"


def test_lines_come_out_as_they_went_in(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        stream = PatientStream(file.fileno())
        stream.write("one\n")
        stream.write("zwölf \udcff\n")
        stream.write(20_000 * "y" + "\n")  # a traceback may be longer than a pipe's page
    assert (tmp_path / "log").read_text() == "one\nzwölf \\udcff\n" + 20_000 * "y" + "\n"


def test_a_pipe_that_nobody_reads_takes_what_it_can_and_says_later_what_is_missing() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as out:
        stream = PatientStream(writer)
        written = 2000
        for _ in range(written):
            stream.write(LINE)
        os.set_blocking(reader, False)
        kept = out.read().decode()
        stream.write("again\n")
        os.close(writer)
        told = out.read().decode()
    lines = kept.count("\n")
    assert 0 < lines < written
    assert told == f"\n({written - lines} lines were left out)\nagain\n"


@pytest.mark.parametrize("broken", ["full", "closed", "nobody there"])
def test_a_stream_that_fails_stops_nobody_either(broken: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    if broken == "full":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    stream = PatientStream(writer)
    if broken == "closed":
        os.close(writer)
    stream.write(LINE)
    if broken != "closed":
        os.close(writer)


def test_a_program_without_standard_streams_keeps_its_files_out_of_their_place(tmp_path: Path) -> None:
    code = f"""
import logging, os
from ormo_runtime import logs
from ormo_runtime.process import prepare_process
prepare_process()
logs.set_up("info", "text")
file = os.open({str(tmp_path / "state")!r}, os.O_WRONLY | os.O_CREAT)
assert file > 2, file
logging.getLogger("x").warning("seen by nobody")
logs.last_words("ormo-x", "nor this", "text")
print("nor this")
"""
    shell = ["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(shell, timeout=60, check=False).returncode == 0
    assert (tmp_path / "state").read_bytes() == b""
