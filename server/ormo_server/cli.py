"""The command line: `ormo-server serve`, `status`, `top`, `control` and `export`.

Each command imports what it needs: only `serve` and `export` wait for PyTorch.
"""

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ormo_runtime import logs
from ormo_runtime.process import keep_freed_memory, prepare_process
from ormo_runtime.settings_loader import BAD_SETTINGS_EXIT_CODE, dispatch, load_settings

if TYPE_CHECKING:
    from ormo_server.service.server import Server
    from ormo_server.settings import ServerSettings

_LOG = logging.getLogger("ormo_server")

_LAST_WORDS_SECONDS = 5.0

USAGE = """usage: ormo-server COMMAND [FLAGS]

commands:
  serve    hold a model's parameters and train them with what workers push
  status   show how a server is doing
  top      show how a server and its workers are doing, again and again
  control  have a server write a checkpoint, change its learning rate, or stop without losing anything
  export   write the model of a run into a file of safetensors or of PyTorch

`ormo-server COMMAND --help` lists the flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    prepare_process()
    commands = {"serve": _serve, "status": _status, "top": _top, "control": _control, "export": _export}
    return dispatch(sys.argv[1:] if argv is None else argv, commands, program="ormo-server", usage=USAGE)


def _serve(argv: Sequence[str]) -> int:
    from ormo_server.settings import ServerSettings

    return serve(load_settings(ServerSettings, argv, program="ormo-server serve"))


def _status(argv: Sequence[str]) -> int:
    from ormo_server.console.settings import StatusSettings
    from ormo_server.console.status import show

    return show(load_settings(StatusSettings, argv, program="ormo-server status"))


def _top(argv: Sequence[str]) -> int:
    from ormo_server.console.settings import TopSettings
    from ormo_server.console.top import watch

    return watch(load_settings(TopSettings, argv, program="ormo-server top"))


def _control(argv: Sequence[str]) -> int:
    from ormo_server.console.settings import ControlSettings
    from ormo_server.console.status import act

    return act(load_settings(ControlSettings, argv, program="ormo-server control"))


def _export(argv: Sequence[str]) -> int:
    from ormo_server.export import ExportSettings, export

    return export(load_settings(ExportSettings, argv, program="ormo-server export"))


def serve(settings: "ServerSettings") -> int:
    """Serve until SIGTERM or SIGINT, or until the run ends if the settings say so.

    Returns:
        0 after a clean end; 1 if the server could not start, could not keep its state, or is broken; 2 for settings
        that can't be used together with what is on disk.
    """
    logs.set_up(settings.log_level, settings.log_format)
    if settings.keep_freed_memory:
        keep_freed_memory()
    import torch

    from ormo_runtime.settings import UsageError
    from ormo_server.core.errors import OrmoError, SettingsError
    from ormo_server.service.resources import TooFewResources, raise_limit_of_descriptors
    from ormo_server.service.server import AddressInUseError, Server
    from ormo_server.store import StoreError

    torch.set_num_threads(settings.threads)
    raise_limit_of_descriptors()
    # A start has nothing to lose, and may hang where no other thread can run: until it is over, signals end us at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        server = Server(settings)
        stop = _stop_signal(server)
        threading.Thread(target=_insist_on_the_end, args=(server,), name="end", daemon=True).start()
        server.start()
    except (StoreError, AddressInUseError, TooFewResources, OrmoError, SettingsError, UsageError) as error:
        logs.last_words("ormo-server", error, settings.log_format)
        return BAD_SETTINGS_EXIT_CODE if isinstance(error, SettingsError | UsageError) else 1
    # One line that programs read: with port 0 nobody else knows where we are.
    facts = {"address": server.address, "metrics": server.metrics_address}
    logs.announce("serving", facts, settings.log_format)
    _LOG.info("serving on %s, metrics on %s", server.address, server.metrics_address or "no port")
    return _run_until_told(server, stop)


def _stop_signal(server: "Server") -> threading.Event:
    """Set by SIGTERM and SIGINT; the process ends as well if the main thread does not come to begin a stop then."""
    stop = threading.Event()
    # Handlers run in the main thread, which may wait for a disk that hangs; the pipe hears of a signal at once.
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_obey_signal, args=(heard, stop, server), name="signal", daemon=True).start()
    return stop


def _obey_signal(heard: int, stop: threading.Event, server: "Server") -> None:
    os.read(heard, 1)
    stop.set()
    limit = server.stop_seconds
    if not server.stopping.wait(limit):  # else `_insist_on_the_end` watches from here on
        _end_now(limit, "the end of a checkpoint")


def _insist_on_the_end(server: "Server") -> None:
    """End the process if its stop takes too long: nobody who waits for it could do more."""
    server.stopping.wait()
    limit = server.stop_seconds
    # By the system, should this thread not come to its turn, or wait for the log.
    signal.alarm(math.ceil(limit + _LAST_WORDS_SECONDS))
    time.sleep(limit)
    _end_now(limit, server.stop_stage)


def _end_now(seconds: float, stage: str) -> NoReturn:
    _LOG.critical(
        "the stop has taken %g s and still waits for %s: the process ends now; the checkpoints and the journal on "
        "disk stay as they are",
        seconds,
        stage,
    )
    os._exit(1)


def _run_until_told(server: "Server", stop: threading.Event) -> int:
    checkpointed_end = False
    while not stop.wait(0.1) and not server.told_to_stop.is_set():
        if not server.serving:
            _LOG.critical(
                "gRPC's thread that accepts calls has ended (see the error above): stopping, so that a restart can help"
            )
            server.drain()
            return 1
        if not server.host.has_model:
            continue
        engine = server.host.engine
        if engine.broken.is_set():
            why = engine.why_broken
            _LOG.critical(
                "the state is broken, or can't be kept on disk (%s): stopping; a restart continues from the newest "
                "sound state",
                why,
            )
            server.close()
            return 1
        if engine.finished.is_set() and not checkpointed_end:
            checkpointed_end = True
            server.host.checkpoint()
            iteration = engine.iteration()[1]
            _LOG.info("the run is over at iteration %d", iteration, extra=logs.Fields(iteration=iteration))
        if checkpointed_end and server.settings.exit_when_finished and not _workers_left(server):
            break
    return 0 if server.drain() else 1


def _workers_left(server: "Server") -> bool:
    """Whether workers have yet to learn that the run is over; silent ones lose their lease in time."""
    with server.host.engine.inspect() as machine:
        return bool(machine.state.members)
