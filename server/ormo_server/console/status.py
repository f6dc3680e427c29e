"""`ormo-server status`: one look, for people and programs; also what a container's health check runs."""

import json
import os
import sys

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import through_proxy
from ormo_server.console.as_json import as_plain
from ormo_server.console.asking import NoAnswerError, asker
from ormo_server.console.config import StatusSettings
from ormo_server.console.words import duration, phase_word

WIDE = 200  # columns of the table where nothing is cut: files and pipes


def show(settings: StatusSettings) -> int:
    """Print a server's status; returns 1 if it does not answer."""
    try:
        with asker(settings.server, settings.timeout, settings.credentials()) as server:
            status = server.ask()
    except NoAnswerError as error:
        sys.stderr.write(no_answer("ormo-server status", settings.server, error))
        return 1
    if settings.json:
        json.dump(as_plain(status), sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        _print(settings.server, status)
    return 0


def no_answer(program: str, server: str, error: NoAnswerError) -> str:
    """The sentence for a server that does not answer."""
    place = server + through_proxy(server, os.environ)
    return f"{program}: no answer from {place} ({error}): is the server up, and is this its address?\n"


def _print(server: str, status: pb.GetStatusResponse) -> None:
    from rich.console import Console  # which JSON can do without

    from ormo_server.console.facts import mean_throughput, of_the_method, of_the_moment, position, refusals
    from ormo_server.console.workers import rows, workers_table

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else WIDE, highlight=False)
    up = duration(status.uptime_seconds)
    facts = {
        "server": f"{server}, version {status.version or 'not known'}, up {up}",
        "progress": f"{phase_word(status.phase).replace('_', ' ')}, {position(status)}",
        "throughput": mean_throughput(status),
        **of_the_method(status),
        **of_the_moment(status),
        "refusals": refusals(status),
    }
    if status.checkpoint_path:
        facts["checkpoint"] += f", {status.checkpoint_path}"
    for name, text in facts.items():
        console.print(f"{name:>13}  {text}", markup=False, soft_wrap=True)
    if status.workers:
        console.print()
        table = workers_table(console, rows(status, None, "worker"), console.width, live=False)
        console.print(table)
