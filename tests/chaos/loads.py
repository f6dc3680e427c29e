"""A worker that pushes gradients which tell whose they are, and writes down what it tries and what it is told.

`python -m chaos.loads SERVER NAME COLUMN WORKERS ELEMENTS PAUSE LEASE LOG`. The k-th gradient of the worker in column j
has 1 in element j, k modulo 64 in element `workers` + j, and k samples: with plain SGD at rate 1 the parameters count
what was applied, exactly.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_worker.client.api import ParameterClient
from ormo_worker.client.arguments import Patience
from ormo_worker.client.messages import Gradient

MARKS = 64


def manifest_of(elements: int) -> Manifest:
    """The model: a vector."""
    return Manifest.laid_out([TensorSpec("weight", (elements,), FLOAT32, PARAMETER)])


def zeros(elements: int) -> Payload:
    """The model at its start."""
    payload = Payload(PayloadLayout.of(manifest_of(elements), FLOAT32, with_buffers=True))
    payload.parameters.zero_()
    return payload


class Diary:
    """A log whose lines are in the file when `write` returns, whatever becomes of the process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **said: Any) -> None:
        """One line; its time is the machine's monotonic clock, which all processes share."""
        os.write(self._descriptor, json.dumps({"at": time.monotonic(), "pid": os.getpid()} | said).encode() + b"\n")


def tried_before(path: Path) -> int:
    """The number of the last gradient that an earlier process tried."""
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["try"] for line in lines if '"try"' in line), default=0)


def main() -> None:
    """Push until SIGTERM or the run's end."""
    server, name, column, workers, elements, seconds, lease, log = sys.argv[1:]
    logging.basicConfig(level="WARNING", format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    over: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: over.append(number))
    number, size = tried_before(Path(log)), int(elements)
    diary = Diary(Path(log))
    diary.write(loaded=True)
    layout = PayloadLayout.of(manifest_of(size), FLOAT32, with_buffers=False)
    gradient = Payload(layout)
    gradient.parameters.zero_()
    gradient.parameters[int(column)] = 1
    patience = Patience(connect_timeout=600.0, failure_timeout=float(lease))
    options: dict[str, Any] = {"worker_id": name, "patience": patience}
    with ParameterClient(server, manifest_of(size), model=lambda: zeros(size), **options) as client:
        client.join()
        slot = client.slots[0]
        outcome = slot.exchange(None)
        while not over and outcome.delivered is not None and outcome.delivered.ticket is not None:
            number, ticket = number + 1, outcome.delivered.ticket
            gradient.parameters[int(workers) + int(column)] = number % MARKS
            diary.write(**{"try": number, "ticket": [ticket.epoch, ticket.number]})
            outcome = slot.exchange(Gradient(gradient, samples=number))
            if outcome.result is not None:
                at = outcome.result.iteration
                diary.write(acked=number, epoch=at.epoch, iteration=at.number, repeated=outcome.result.repeated)
            elif outcome.refusal is not None:
                diary.write(refused=number, reason=outcome.refusal.refusal)
            time.sleep(float(seconds))
        diary.write(ended=True)


if __name__ == "__main__":
    main()
