"""One rank of a worker that is several processes, as a script: it trains on its own part of each batch.

Its one argument is JSON; what it prints is JSON: `progress` in each step, `result` at its end.
"""

import hashlib
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ormo_worker import OrmoError, RemoteOptimizer

FEATURES, PER_RANK = 6, 8


class Model(nn.Module):
    """Tied weights, a norm layer, a frozen parameter, and buffers of three kinds if it has batch norm."""

    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, FEATURES, bias=False)
        self.norm = nn.BatchNorm1d(FEATURES) if batch_norm else nn.LayerNorm(FEATURES)
        self.decode = nn.Linear(FEATURES, FEATURES, bias=False)
        self.decode.weight = self.encode.weight
        self.frozen = nn.Parameter(torch.full((FEATURES,), 0.5), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen |= torch.ones((), dtype=torch.bool)
        return self.decode(torch.tanh(self.norm(self.encode(inputs)))) * self.frozen


def batch(step: int, ranks: int, rank: int | None = None) -> torch.Tensor:
    """All of a step's samples, or one rank's."""
    whole = torch.randn(PER_RANK * ranks, FEATURES, generator=torch.Generator().manual_seed(step))
    return whole if rank is None else whole[rank * PER_RANK : (rank + 1) * PER_RANK]


def loss_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(inputs), inputs.flip(1))


def digest(model: nn.Module) -> str:
    """Of every bit of the model."""
    whole = hashlib.sha256()
    for value in model.state_dict().values():
        whole.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def train(options: dict[str, Any]) -> dict[str, Any]:
    rank, ranks = options["rank"], options["ranks"]
    torch.manual_seed(rank)  # the ranks begin with different models
    model = Model(batch_norm=options.get("batch_norm", False))
    group = dist.new_group(timeout=timedelta(seconds=options.get("step_timeout", 60)))
    wrapped: nn.Module = model
    if options.get("ddp") is None:
        wrapped = DistributedDataParallel(model, process_group=group)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01) if options.get("inner") else None
    given = {"inner": inner, "in_flight": options.get("in_flight", 1)}
    if options.get("process_group", True):
        given["process_group"] = group
    step, digests = 0, []
    with RemoteOptimizer(wrapped, options["address"], batch_size=PER_RANK, connect_timeout=20.0, **given) as optimizer:
        digests.append(digest(model))
        if options.get("ddp") == "late":  # as trainers do
            wrapped = DistributedDataParallel(model, process_group=group)
        while not optimizer.finished and step != options.get("steps"):
            if options.get("dies_at") == step:
                os.kill(os.getpid(), signal.SIGKILL)
            if options.get("reloads_at") == step:  # as after a checkpoint of the program's own
                nn.init.constant_(model.encode.weight, float(rank))
                optimizer.reload()
                digests.append(digest(model))
            optimizer.zero_grad()
            loss = loss_of(wrapped, batch(step, ranks, rank))
            loss.backward()
            optimizer.step(loss=loss)
            step += 1
            digests.append(digest(model))
            say(step=step)
        result = {"iteration": optimizer.iteration, "finished": optimizer.finished, "counted": optimizer.counted}
        result |= {"rank": optimizer.rank, "seed": optimizer.data_seed, "progress": optimizer.progress}
    return result | {"steps": step, "digests": digests, "refused": optimizer.refusals.total()}


def main() -> None:
    options = json.loads(sys.argv[1])
    store = f"file://{Path.cwd() / options['store']}"
    timeout = timedelta(seconds=options.get("timeout", 60))
    dist.init_process_group(
        "gloo", init_method=store, rank=options["rank"], world_size=options["ranks"], timeout=timeout
    )
    began = time.monotonic()
    try:
        say(result=train(options))
    except (OrmoError, RuntimeError) as error:
        say(error=type(error).__name__, said=str(error), seconds=time.monotonic() - began)
        os._exit(1)  # as an error that nobody catches: nothing is tidied up


if __name__ == "__main__":
    main()
