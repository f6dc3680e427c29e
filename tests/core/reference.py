"""What the state has to be, computed from the formulas of docs/algorithm.md in float64, by none of the core's code."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from core.driving import Applied
from ormo_server.core.method import Run

# Half the distance from 1 to the next float32: the relative error of one rounding.
UNIT_ROUNDOFF = 2.0**-24

# The scale of a gradient by its delay (0 in a round, whatever it was) and what else is known of it.
SCALES: dict[str, Callable[[int, Applied], float]] = {
    "constant": lambda delay, each: 1.0,
    "delay-adaptive": lambda delay, each: 1.0 if delay <= 2 * each.bucket_size else 2 * each.bucket_size / delay,
    "inverse": lambda delay, each: 1.0 if delay <= 1 else 1 / delay,
    "polynomial": lambda delay, each: (1 + delay) ** -0.5,
    "rescaled": lambda delay, each: each.seconds * statistics.mean(1 / seconds for seconds in each.seconds_of_slots),
}


def closed_form(
    start: torch.Tensor, applied: Sequence[Applied], beta: float, *, ahead: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(w, u) as sums over all gradients that counted; `ahead` moves of the momentum are in w before their time."""
    newest = max((each.bucket for each in applied), default=0)
    params, momentum = start.double().clone(), torch.zeros_like(start).double()
    for each in applied:
        age = newest - each.bucket
        momentum += beta**age * each.step_size * each.values
        params -= sum(beta**k for k in range(age + 1 + ahead)) * each.step_size * each.values
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
    """η × scale of each gradient: η is looked up at t when a bucket opens and holds while that bucket is the newest.

    Of a bucket's mean not under the synchronous scheduler, whose weight goes by its round.
    """
    learning_rate, newest, expected = run.learning_rate.at(0), 0, []
    for iteration, each in enumerate(applied):
        if each.bucket > newest:
            newest, learning_rate = each.bucket, run.learning_rate.at(iteration)
        delay = 0 if run.method.scheduler == "synchronous" else each.delay
        weight = 1 / max(each.bucket_size_before, each.bucket_size) if run.method.bucket == "mean" else 1
        expected.append(learning_rate * SCALES[run.method.scale](delay, each) * weight)
    return expected


def round_sums(applied: Sequence[Applied]) -> list[tuple[int, torch.Tensor]]:
    """(t at the round's opening, Σ g) for each synchronous round that applied anything."""
    rounds = itertools.groupby(applied, key=lambda each: each.ticket_iteration)
    return [(opening, sum((each.values for each in members), torch.zeros(()))) for opening, members in rounds]


def torch_sgd(
    start: torch.Tensor, gradients: Iterable[torch.Tensor], lr: float, beta: float, *, nesterov: bool = False
) -> Iterator[torch.Tensor]:
    """Where `torch.optim.SGD` is at the start and after each of these gradients, in float64."""
    weights = start.double().clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=lr, momentum=beta, nesterov=nesterov)
    yield weights.detach().clone()
    for gradient in gradients:
        weights.grad = gradient.double().clone()
        optimizer.step()
        yield weights.detach().clone()


class Formula:
    """An update rule in float64, a gradient after the other: w, and vectors by the names that checkpoints have.

    Args:
        sign: +1 adds wherever the rule subtracts. Fed with magnitudes, w and the vectors are then the largest that they
            and all that they are made of could be.
    """

    def __init__(self, start: torch.Tensor, run: Run, sign: float = -1.0) -> None:
        self.w = start.double().clone()
        self.beta, self.compensation, self.sign = run.momentum, run.delay_compensation, sign
        self.vectors: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros_like(self.w))
        self.newest = self.gathered = self.applied = self.delay_steps = 0
        self.steps_at: list[int] = []
        self.run = run
        self.holders: dict[str, tuple[str, int, int]] = {}

    def sgd(self, each: Applied) -> None:
        self.w += self.sign * each.step_size * each.values

    def naive(self, each: Applied) -> None:
        self.vectors["momentum"] = self.beta * self.vectors["momentum"] + each.step_size * each.values
        self.w += self.sign * self.vectors["momentum"]

    def naive_nesterov(self, each: Applied) -> None:
        self.vectors["momentum"] = self.beta * self.vectors["momentum"] + each.step_size * each.values
        self.w += self.sign * (each.step_size * each.values + self.beta * self.vectors["momentum"])

    def delayed_nesterov(self, each: Applied) -> None:
        self.gathered += 1
        self.vectors["gathered"] += each.step_size * each.values
        self.w += self.sign * each.step_size * each.values
        if self.gathered >= each.bucket_size:
            self.vectors["momentum"] = self.beta * self.vectors["momentum"] + self.vectors["gathered"]
            self.w += self.sign * self.beta * self.vectors["momentum"]
            self.vectors["gathered"] = torch.zeros_like(self.w)
            self.gathered = 0

    def shifted(self, each: Applied) -> None:
        worker, _, slot = each.holder
        name = f"momentum/{worker}/{slot}"
        if self.holders.get(name) != each.holder:  # a newcomer in this place
            self.holders[name] = each.holder
            self.vectors[name] = torch.zeros_like(self.w)
        self.vectors[name] = self.beta * self.vectors[name] + each.step_size * each.values
        self.w += self.sign * self.vectors[name]

    def ormo_vanilla(self, each: Applied) -> None:
        while self.newest < each.bucket:
            self.newest += 1
            self.vectors["momentum"] *= self.beta
            self.w += self.sign * self.vectors["momentum"]
        self.vectors["momentum"] += self.beta ** (self.newest - each.bucket) * each.step_size * each.values
        self.w += self.sign * each.step_size * each.values

    def ormo_nesterov(self, each: Applied) -> None:
        while self.newest < each.bucket:
            self.newest += 1
            self.vectors["momentum"] *= self.beta
            self.w += self.sign * self.beta * self.vectors["momentum"]
        lag = self.newest - each.bucket
        self.vectors["momentum"] += self.beta**lag * each.step_size * each.values
        self.w += self.sign * sum(self.beta**k for k in range(lag + 2)) * each.step_size * each.values

    def smega2(self, each: Applied) -> None:
        self.gathered += 1
        self.vectors["gathered"] += each.values
        self.w += self.sign * each.step_size * (each.values + self.beta * self.vectors["momentum"])
        if self.gathered >= each.bucket_size:
            self.vectors["momentum"] = self.beta * self.vectors["momentum"] + self.vectors["gathered"] / self.gathered
            self.vectors["gathered"] = torch.zeros_like(self.w)
            self.gathered = 0

    def fadas(self, each: Applied) -> None:
        self.applied += 1
        self.gathered += 1
        self.vectors["gathered"] += each.values
        if self.run.method.scheduler != "synchronous":
            late = sum(at > each.ticket_iteration for at in self.steps_at)
            self.delay_steps = max(self.delay_steps, late)
        if self.gathered < each.bucket_size:
            return
        self.steps_at.append(self.applied)
        mean, steps, beta2 = self.vectors["gathered"] / self.gathered, len(self.steps_at), self.run.second_momentum
        m = self.vectors["momentum"] = self.beta * self.vectors["momentum"] + (1 - self.beta) * mean
        v = self.vectors["second_moment"] = beta2 * self.vectors["second_moment"] + (1 - beta2) * mean**2
        most = self.vectors["largest_second_moment"] = torch.maximum(self.vectors["largest_second_moment"], v)
        move = m / (1 - self.beta**steps) / ((most / (1 - beta2**steps)).sqrt() + self.run.epsilon)
        if self.sign > 0:  # of magnitudes, v̂ would be too large: the most that it can be, whatever came
            move = torch.full_like(move, (1 - beta2) ** -0.5)
        late_factor = 1 / self.delay_steps if self.delay_steps > self.run.method.delay_threshold else 1
        self.w += self.sign * each.step_size * late_factor * move
        self.vectors["gathered"] = torch.zeros_like(self.w)
        self.gathered = self.delay_steps = 0

    def dc(self, each: Applied) -> None:
        moved = self.w + self.sign * each.sent
        self.w = self.w + self.sign * each.step_size * (each.values + self.compensation * each.values**2 * moved)

    def sent_by_smega2(self, learning_rate: float, bucket_size: int) -> torch.Tensor:
        size, gathered = max(bucket_size, self.gathered), self.gathered
        ahead = (size + gathered * (self.beta - 1)) * self.vectors["momentum"]
        ahead += gathered / size * self.vectors["gathered"]
        return self.w + self.sign * learning_rate * self.beta * ahead


STEPS: dict[str, Callable[[Formula, Applied], None]] = {
    "sgd": Formula.sgd,
    "naive": Formula.naive,
    "shifted": Formula.shifted,
    "ormo-vanilla": Formula.ormo_vanilla,
    "ormo-nesterov": Formula.ormo_nesterov,
    "smega2": Formula.smega2,
    "dc": Formula.dc,
    "naive-nesterov": Formula.naive_nesterov,
    "delayed-nesterov": Formula.delayed_nesterov,
    "fadas": Formula.fadas,
}


def by_formula(rule: str, start: torch.Tensor, applied: Iterable[Applied], run: Run) -> tuple[Formula, Formula]:
    """The rule after these gradients, and how large every number could have been on the way."""
    exact, largest = Formula(start, run), Formula(start.abs(), run, sign=1.0)
    for each in applied:
        STEPS[rule](exact, each)
        STEPS[rule](largest, magnitudes(each))
    return exact, largest


def magnitudes(each: Applied) -> Applied:
    return replace(each, values=each.values.abs(), sent=each.sent.abs())


def assert_but_for_rounding(
    actual: torch.Tensor, exact: torch.Tensor, largest: torch.Tensor, gradients: int, what: str = ""
) -> None:
    """float32 is as close to the formula as its roundings allow.

    All rules but `dc` are sums of products, and `dc` is one of sums of them. The error of such a number is at most as
    many roundings of its largest possible value as there are on the longest way from an input to it. No rule has more
    than 10 for a gradient (`dc`: difference, two products with g, λ and its product, the sum with g, η and its product,
    the sum with w), nor does a delivery. 1e-30 keeps exact zeros comparable.
    """
    allowed = 10 * UNIT_ROUNDOFF * (gradients + 1) * largest + 1e-30
    assert bool(((actual.double() - exact).abs() <= allowed).all()), (what, actual, exact, allowed)
