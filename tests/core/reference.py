"""What the state has to be, computed from the formulas of the design in float64, by none of the core's code."""

import itertools
from collections.abc import Callable, Sequence

import torch

from core.driving import Applied
from ormo_server.core.method import Run

# Half the distance from 1 to the next float32: the relative error of one rounding.
UNIT_ROUNDOFF = 2.0**-24

SCALES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda delay, size: 1.0,
    "delay-adaptive": lambda delay, size: 1.0 if delay <= 2 * size else 2 * size / delay,
    "inverse": lambda delay, size: 1.0 if delay <= 1 else 1 / delay,
}


def closed_form(start: torch.Tensor, applied: Sequence[Applied], beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(w, u) as sums over all gradients that counted."""
    newest = max((each.bucket for each in applied), default=0)
    params, momentum = start.double().clone(), torch.zeros_like(start).double()
    for each in applied:
        age = newest - each.bucket
        momentum += beta**age * each.step_size * each.values
        params -= sum(beta**k for k in range(age + 1)) * each.step_size * each.values
    return params, momentum


def rounding(start: torch.Tensor, applied: Sequence[Applied], beta: float) -> torch.Tensor:
    """How far float32 may be from the closed form, per element.

    With h = 1 + β + … + β^b, |w| stays below |w_0| + h Σ η|g| and |u| below Σ η|g|. A gradient changes w twice (three
    roundings each: coefficient, product, sum) and u twice, and an error of u later moves w by at most h times as much:
    at most 6 + 6 roundings a gradient, of numbers no larger than that. 1e-30 keeps exact zeros comparable.
    """
    size = sum((each.step_size * each.values.abs() for each in applied), torch.zeros_like(start).double())
    history = sum(beta**k for k in range(max((each.bucket for each in applied), default=0) + 1))
    return 12 * UNIT_ROUNDOFF * len(applied) * (start.double().abs() + history * size) + 1e-30


def step_sizes(run: Run, applied: Sequence[Applied]) -> list[float]:
    """η × scale of each gradient: η is looked up at t when a bucket opens and holds while that bucket is the newest."""
    learning_rate, newest, expected = run.learning_rate.at(0), 0, []
    for iteration, each in enumerate(applied):
        if each.bucket > newest:
            newest, learning_rate = each.bucket, run.learning_rate.at(iteration)
        delay = 0 if run.method.scheduler == "synchronous" else each.delay
        expected.append(learning_rate * SCALES[run.method.scale](delay, each.bucket_size))
    return expected


def round_sums(applied: Sequence[Applied]) -> list[tuple[int, torch.Tensor]]:
    """(t at the round's opening, Σ g) for each synchronous round that applied anything."""
    rounds = itertools.groupby(applied, key=lambda each: each.ticket_iteration)
    return [(opening, sum((each.values for each in members), torch.zeros(()))) for opening, members in rounds]


def torch_sgd(start: torch.Tensor, gradients: Sequence[torch.Tensor], lr: float, beta: float) -> torch.Tensor:
    """Where `torch.optim.SGD` goes with these gradients, in float64."""
    weights = start.double().clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=lr, momentum=beta)
    for gradient in gradients:
        weights.grad = gradient.clone()
        optimizer.step()
    return weights.detach()
