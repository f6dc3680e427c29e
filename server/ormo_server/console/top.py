"""`ormo-server top`: look at a server again and again."""

import os
import sys
import time

from rich.console import Console
from rich.live import Live

from ormo_runtime.channels import through_proxy
from ormo_runtime.signals import leave_if_asked, leave_on_signals
from ormo_server.console.asking import Asker, NoAnswerError, asker
from ormo_server.console.config import TopSettings
from ormo_server.console.keys import pressed, single_keys
from ormo_server.console.rates import History
from ormo_server.console.status import WIDE, no_answer
from ormo_server.console.view import View
from ormo_server.console.words import duration

_QUIT = "q"


def watch(settings: TopSettings) -> int:
    """Show the server until the user has seen enough; where there is no screen, once. Returns the exit code."""
    leave_on_signals()  # SIGTERM too, or the terminal would be left as it is now
    console = Console(highlight=False)
    screen = sys.stdout.isatty() and not console.is_dumb_terminal
    try:
        with asker(settings.server, settings.timeout, settings.credentials()) as server:
            if screen and not settings.once:
                _live(console, server, settings)
                return 0
            return _once(server, settings, console if screen else Console(width=WIDE, highlight=False))
    except KeyboardInterrupt:
        return 0


def _once(server: Asker, settings: TopSettings, console: Console) -> int:
    history = History()
    try:
        history.add(server.ask())
        time.sleep(settings.every_seconds)  # two answers make a rate
        history.add(server.ask())
    except NoAnswerError as error:
        sys.stderr.write(no_answer("ormo-server top", settings.server, error))
        return 1
    console.print(View(settings.server, history, settings.sort))
    return 0


def _live(console: Console, server: Asker, settings: TopSettings) -> None:
    history, answered = History(), time.monotonic()
    place = settings.server + through_proxy(settings.server, os.environ)
    with single_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            leave_if_asked()
            due, trouble = time.monotonic() + settings.every_seconds, ""
            try:
                history.add(server.ask())
                answered = time.monotonic()
            except NoAnswerError as error:
                silent = duration(time.monotonic() - answered)
                trouble = f"no answer from {place} for {silent}, trying again: {error}"
            view = View(settings.server, history, settings.sort, console.height, trouble)
            live.update(view, refresh=True)
            if pressed(_QUIT, due - time.monotonic()):
                return
