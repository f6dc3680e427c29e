"""The commands that ask once: `ormo-server status`, as text or as JSON that every reader takes, and `control`."""

import json
import math
import os
import sys
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import through_proxy
from ormo_server.console.client import NoAnswerError, RefusedError, asker
from ormo_server.console.figures import duration, phase_word
from ormo_server.console.settings import ControlSettings, StatusSettings


def as_plain(message: Message) -> dict[str, Any]:
    """All fields under their names in the contract, whether set or not.

    Protobuf's own JSON has 64-bit integers and NaN as text, which `jq` can't count with, and leaves fields out. Here
    numbers are numbers; what is not set, NaN or infinite is None; random 64-bit numbers are 16 hexadecimal digits.
    """
    return {
        field.name: _field(field, getattr(message, field.name))
        if not field.has_presence or message.HasField(field.name)
        else None
        for field in message.DESCRIPTOR.fields
    }


def _field(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        of_values = field.message_type.fields_by_name["value"]
        return {str(key): _value(of_values, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_value(field, item) for item in value]
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_plain(value)
    if field.enum_type is not None:  # a status has no other
        return phase_word(value)
    if field.type == FieldDescriptor.TYPE_FIXED64:
        return f"{value:016x}"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


WIDE = 200  # columns of the table where nothing is cut: files and pipes


def show(settings: StatusSettings) -> int:
    """Print a server's status; returns 1 if it does not answer."""
    try:
        with asker(settings.server, settings.timeout_seconds, settings.credentials()) as server:
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
    """The sentence for a server that does not answer, or refuses."""
    place = server + through_proxy(server, os.environ)
    if isinstance(error, RefusedError):
        return f"{program}: the server at {place} refused: {error}\n"
    return f"{program}: no answer from {place} ({error}): is the server up, and is this its address?\n"


def _print(server: str, status: pb.GetStatusResponse) -> None:
    from rich.console import Console  # which JSON can do without

    from ormo_server.console.figures import mean_throughput, of_the_method, of_the_moment, position, refusals
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


def act(settings: ControlSettings) -> int:
    """Have the server do it; returns 1 if it does not, or does not answer."""
    try:
        with asker(settings.server, settings.timeout_seconds, settings.credentials()) as server:
            answer = server.control(_request(settings))
    except NoAnswerError as error:
        sys.stderr.write(no_answer("ormo-server control", settings.server, error))
        return 1
    sys.stdout.write(_said(settings, answer) + "\n")
    return 0


def _request(settings: ControlSettings) -> pb.ControlRequest:
    if settings.checkpoint:
        return pb.ControlRequest(checkpoint=pb.CheckpointNow())
    if settings.drain:
        return pb.ControlRequest(drain=pb.Drain())
    return pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=settings.learning_rate or 0.0))


def _said(settings: ControlSettings, answer: pb.ControlResponse) -> str:
    at = f", at iteration {answer.iteration.number}" if answer.HasField("iteration") else "; it has no model yet"
    if settings.checkpoint:
        return f"checkpoint {answer.checkpoint_path}"
    if settings.drain:
        return f"the server drains and stops{at}"
    return f"the learning rate is {settings.learning_rate:g} from the next bucket on{at}"
