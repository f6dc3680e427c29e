"""`ormo_server.local()`: a real server for a notebook or a test, as `ormo-server serve` is, on this machine.

It is a process of its own. So it takes neither signals, nor the log, nor the threads of PyTorch from the program that
starts it; a cell that is interrupted interrupts the program alone; forks, as a `DataLoader` makes them, have none of
its sockets; and when the program ends, however it does, the server learns of it and stops in order.
"""

import contextlib
import difflib
import fcntl
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ormo_runtime.logs import announced, printable
from ormo_runtime.settings import flag_of, variables_of
from ormo_runtime.settings_loader import SettingsProblemsError, read_settings
from ormo_server.core.errors import SettingsError
from ormo_server.settings import ServerSettings

_LOG = logging.getLogger(__name__)

# Where they differ from `ormo-server serve`; and the directory is a temporary one.
_DEFAULTS: Mapping[str, Any] = {"listen": "127.0.0.1:0", "metrics_listen": ""}
_CHILD = "import sys; from ormo_server.from_python import serve_for_parent; sys.exit(serve_for_parent(sys.argv[1:]))"
# A server whose program has just ended writes its checkpoint; its directory is free then.
_FREE_SECONDS = 60.0
_POLL_SECONDS = 0.05
# Longer than a server takes that stops in order: it insists on its end by itself.
_STOP_SECONDS = 90.0
_LAST_LINES = 3
# By directory, for a cell of a notebook that is run again.
_running: "weakref.WeakValueDictionary[Path, LocalServer]" = weakref.WeakValueDictionary()


class ServerFailed(RuntimeError):
    """The server did not start, or has ended by itself; the sentence says what it said last."""


def local(**settings: Any) -> "LocalServer":
    """Start a server of this machine; it serves when this returns.

    For example::

        with ormo_server.local(learning_rate=0.05, stop_after_gradients=500) as address:
            train(RemoteOptimizer(model, address))

    For several cells of a notebook, keep it by a name, and close it in the last one: `server = local(...)`,
    `server.address`, `server.close()`. If it is forgotten, or the program ends, it stops as well.

    Args:
        settings: those of `ormo-server serve`, by the flags' names with underscores. It listens on a free port of
            127.0.0.1, serves no metrics, and has a temporary directory, unless they say otherwise. Neither the
            environment nor a file counts. A server that this program has started for the same directory is closed
            first, and its run goes on.

    Raises:
        SettingsError: a setting that there is none of, or a value that can't be used.
        ServerFailed: it did not start.
    """
    return LocalServer(settings)


class LocalServer:
    """A server that runs; see `local`.

    Attributes:
        address: host and port, for workers.
        metrics_address: the same of its metrics; empty unless `metrics_listen` was given.
        directory: of the run; a temporary one is removed with the server.
        log: file with what it says.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        given = {**_DEFAULTS, **{name: value for name, value in settings.items() if value is not None}}
        temporary = "directory" not in given
        directory = Path(tempfile.mkdtemp(prefix="ormo-local-")) if temporary else Path(given["directory"]).absolute()
        try:
            flags = _checked_flags({**given, "directory": directory})
            if not temporary:
                _make_free(directory)
            self.directory = directory
            self.log = directory / "logs" / "server.log"
            self._begin(flags, directory if temporary else None)
        except BaseException:
            if temporary:
                shutil.rmtree(directory, ignore_errors=True)
            raise

    def _begin(self, flags: list[str], removed_with_it: Path | None) -> None:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"ormo_server.local(): can't write to {self.directory} ({error.strerror}): make it writable, or choose "
                "another directory"
            ) from error
        command = [sys.executable, "-P", "-c", _CHILD, str(removed_with_it or ""), *flags]
        with self.log.open("ab") as log:
            # A session of its own: what interrupts a notebook's kernel is sent to all of its session.
            process = subprocess.Popen(  # noqa: S603
                command,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._process = process
        self._stop = weakref.finalize(self, _stop, process, removed_with_it, os.getpid())
        try:
            assert process.stdout is not None
            ready = announced(process.stdout.readline().decode())
            if not ready:
                raise ServerFailed(f"the server did not start: {self._last_words(process.wait())}")
        except BaseException:
            process.kill()  # it has nothing to lose yet
            self._stop()
            raise
        self.address, self.metrics_address = ready["address"], ready["metrics"]
        _running[self.directory.resolve()] = self

    def close(self) -> None:
        """Stop it in order: exchanges end, and a checkpoint is written. May be called again.

        Raises:
            ServerFailed: it had ended by itself, and not because it was told to.
        """
        code = self._process.poll() if self._stop.alive else 0
        words = self._last_words(code) if code else ""
        self._stop()
        if words:
            raise ServerFailed(f"the server ended before it was closed: {words}")

    def __enter__(self) -> str:
        return self.address

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except ServerFailed as error:
            if kind is None:
                raise
            _LOG.error("%s", error)  # what came first is the program's to see

    def __repr__(self) -> str:
        return f"<server on {self.address}, {'running' if self._process.poll() is None else 'stopped'}>"

    def _last_words(self, code: int) -> str:
        said = [printable(line) for line in self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]]
        return f"exit code {code}; " + ("\n".join(said) or "it said nothing")


def _stop(process: "subprocess.Popen[bytes]", removed_with_it: Path | None, owner: int) -> None:
    """Tell it to stop and wait; also at the end of the program, and when nobody has the server any more."""
    if os.getpid() != owner:  # a fork that ends must not stop its parent's
        return
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(OSError):
            process.stdin.close()  # what it waits for
        process.wait(_STOP_SECONDS)
    finally:  # an interrupted wait, too, leaves nothing behind
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        if removed_with_it is not None:
            shutil.rmtree(removed_with_it, ignore_errors=True)


def _checked_flags(given: Mapping[str, Any]) -> list[str]:
    known = ServerSettings.model_fields
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else "; `ormo-server serve --help` lists them"
            raise SettingsError(f"ormo_server.local() has no setting {name!r}{hint}")
    flags = [word for name, value in given.items() for word in _flag(name, value)]
    try:
        read_settings(ServerSettings, flags, {}, program="ormo_server.local()")
    except SettingsProblemsError as error:
        said = "\n".join(re.sub(r"--([a-z][a-z-]*)", lambda m: m[1].replace("-", "_"), each) for each in error.problems)
        raise SettingsError(f"ormo_server.local(): {said}") from None
    return flags


def _flag(name: str, value: Any) -> list[str]:
    flag = flag_of(name)
    if isinstance(value, bool) and ServerSettings.model_fields[name].annotation is bool:
        return [flag if value else f"--no-{flag[2:]}"]
    return [f"{flag}={','.join(map(str, value)) if isinstance(value, tuple | list) else value}"]


def _environment() -> dict[str, str]:
    """Ours without settings of servers: a call means the same whatever they are."""
    ours = variables_of(ServerSettings)
    return {name: value for name, value in os.environ.items() if name.upper() not in ours}


def _make_free(directory: Path) -> None:
    """Close what this program has started there, and wait for what an earlier one has, which is about to end."""
    older = _running.get(directory.resolve())
    if older is not None:
        _LOG.warning("the server that was started for %s is closed: another takes its place", directory)
        with contextlib.suppress(ServerFailed):
            older.close()
    deadline = time.monotonic() + _FREE_SECONDS
    while _is_orphans(directory) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _is_orphans(directory: Path) -> bool:
    """Whether the directory is held by a server of ours whose program has ended."""
    try:
        with (directory / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                holder = Path("/proc") / file.read().strip()
                ours = b"serve_for_parent" in (holder / "cmdline").read_bytes()
                parent = (holder / "stat").read_text().rpartition(")")[2].split()[1]
                return ours and not _is_python(Path("/proc") / parent)
    except OSError:  # it is not there, or has ended by now
        pass
    return False


def _is_python(process: Path) -> bool:
    """Whether this may be the program that started it, and not whoever takes in processes whose parent has ended."""
    return (process / "exe").readlink() == Path(sys.executable).resolve()


# In the server's process


def serve_for_parent(arguments: list[str]) -> int:
    """Serve until the program that has started this process closes its pipe to it, or ends; returns the exit code.

    Args:
        arguments: a directory to remove at the end, or nothing; then flags.
    """
    from ormo_server.cli import main

    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    removed, *flags = arguments
    try:
        return main(["serve", *flags])
    finally:
        if removed:
            shutil.rmtree(removed, ignore_errors=True)


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing ever comes
    os.kill(os.getpid(), signal.SIGTERM)
