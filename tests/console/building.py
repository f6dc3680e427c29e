"""Answers of a server that never was."""

import io
from typing import Any

from rich.console import Console

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.console.figures import History
from ormo_server.console.top import View


def worker(name: str, **fields: Any) -> pb.WorkerStatus:
    return pb.WorkerStatus(**{"worker": name, "slots": 1} | fields)


def status(*workers: pb.WorkerStatus, uptime: float = 10.0, epoch: int = 1, **fields: Any) -> pb.GetStatusResponse:
    given = {"phase": pb.GetStatusResponse.PHASE_TRAINING, "method": "ormo", "bucket_size": max(1, len(workers))}
    iteration = pb.Iteration(epoch=epoch, number=fields.pop("iteration", 0))
    return pb.GetStatusResponse(workers=workers, uptime_seconds=uptime, iteration=iteration, **given | fields)


def history(*answers: pb.GetStatusResponse) -> History:
    made = History()
    for answer in answers:
        made.add(answer)
    return made


def screen(
    seen: History, width: int = 160, height: int | None = None, sort: str = "delay", trouble: str = "", **console: Any
) -> str:
    """What the view looks like."""
    file = io.StringIO()
    view = View("127.0.0.1:50051", seen, sort, height, trouble)
    Console(file=file, width=width, height=height, **console).print(view)
    return file.getvalue()
