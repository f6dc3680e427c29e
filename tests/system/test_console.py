"""What operators look at, with real programs: `top` on a terminal, and logs that programs read."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time

import pytest

from system.programs import ENVIRONMENT, Stage

SHOW_CURSOR, ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?25h", b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    """A pseudo-terminal with `ormo-server top` in it."""

    def __init__(self, address: str, *flags: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 140))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ormo_server", "top", "--server", address, "--every-seconds", "0.2", *flags],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=ENVIRONMENT | {"TERM": "xterm-256color"},
            start_new_session=True,
        )
        self.shown = b""

    def read(self, seconds: float) -> None:
        if select.select([self._ours], [], [], seconds)[0]:
            self.shown += os.read(self._ours, 65536)

    def until(self, text: bytes, seconds: float = 20.0) -> None:
        """Read on until this is shown; what was before it is forgotten."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self.shown[-3000:]!r}"
            self.read(0.1)
        self.shown = self.shown.partition(text)[2]

    def end(self) -> int:
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read(0.1)
        self.read(0.1)
        return self.process.wait(1)

    @property
    def settings(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._ours)
        os.close(self._theirs)


def test_top_shows_workers_survives_a_restart_and_leaves_the_terminal_as_it_was(stage: Stage) -> None:
    server = stage.server()
    stage.worker("quick", slow_factor=20)
    terminal = Terminal(stage.address)
    try:
        terminal.until(b"quick")
        server.kill()
        terminal.until(b"trying again")
        stage.server()
        terminal.until(b"quick")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.end() == 0
        assert SHOW_CURSOR in terminal.shown
        assert LEAVE_SCREEN in terminal.shown
        assert terminal.settings == terminal.before
    finally:
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_top_leaves_at_once_while_it_waits_for_an_answer(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        terminal = Terminal(f"127.0.0.1:{silent.getsockname()[1]}", "--timeout-seconds", "100")
        try:
            terminal.until(ENTER_SCREEN)
            with silent.accept()[0]:
                os.kill(terminal.process.pid, number)
                assert terminal.end() == 0
            assert LEAVE_SCREEN in terminal.shown
            assert terminal.settings == terminal.before
        finally:
            terminal.close()


def test_every_line_of_json_logs_says_what_it_is_about(stage: Stage) -> None:
    flags = {"log_format": "json", "log_level": "debug"}
    server = stage.server(stop_after_gradients=5, **flags)
    worker = stage.worker("w1", **flags)
    evaluator = stage.evaluator("e", **flags)
    assert worker.wait() == 0
    assert evaluator.wait() == 0
    assert server.terminate() == 0
    printed = [json.loads(line) for each in (server, worker, evaluator) for line in each.printed()[1].splitlines()]
    assert {line["message"] for line in printed} == {"evaluation"}, "the server's first line was read before"
    served = [json.loads(line) for line in server.log.read_text().splitlines()]
    trained = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in (*served, *trained))
    assert not {line["level"] for line in (*served, *trained)} & {"warning", "error", "critical"}, "of a clean end"
    applied = [line for line in served if line["message"].startswith("applied a gradient")]
    assert [line["iteration"] for line in applied] == [1, 2, 3, 4, 5]
    assert {line["worker"] for line in applied} == {"w1"}
    assert [line["ticket"] for line in applied] == [1, 2, 3, 4, 5]
    assert all(
        {"slot", "request", "delay", "lag_buckets", "step_size", "samples", "loss"} <= set(line) for line in applied
    )
    (joined,) = [line for line in served if " joined (rank " in line["message"]]
    assert (joined["worker"], joined["level"]) == ("w1", "info")
    assert {line["worker"] for line in trained} == {"w1"}
    counted = [line for line in trained if line["message"].startswith("a gradient was counted")]
    assert [(line["ticket"], line["iteration"]) for line in counted] == [(n, n) for n in (1, 2, 3, 4, 5)]
