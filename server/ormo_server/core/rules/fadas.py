"""FADAS (Wang, Wang, Wu, Chen: FADAS: Towards Federated Adaptive Asynchronous Optimization, ICML 2024, arXiv
2407.18365): an adaptive optimizer on the server, for whole buckets.
"""

import math

import torch
from typing_extensions import override

from ormo_server.core.ids import SlotKey
from ormo_server.core.rules.base import Coefficients, Landing, UpdateRule
from ormo_server.core.vectors import Vector, walk_gradient

# Longer gradients are refused: the sum of 2^31 of these, and the square of their mean, are far from float32's end.
_LARGEST_NORM = 2.0**40
_LARGEST_ELEMENT = 2.0**86


class BufferedAmsgrad(UpdateRule):
    """Once K gradients are gathered, their mean makes one step of AMSGrad, as in the authors' code.

        B ← B + g                                                   for every gradient
        d = B/K,  m ← β₁m + (1 − β₁)d,  v ← β₂v + (1 − β₂)d²,  v̂ ← max(v̂, v)
        w ← w − s · min(1, 1/τ if τ > τ_c) · [m/(1 − β₁^n)] / [√(v̂/(1 − β₂^n)) + ε],  B ← 0      at the n-th step

    s is that of the gradient that fills B. τ is the largest delay in B, counted in steps of this kind since the ticket
    was handed out; τ_c is the delay threshold, whose unit, K gradients, is such a step. Above it the authors' code
    multiplies by 1/τ, which this does; their paper has min(s, 1/τ), which at the rates of Adam is always s. In rounds
    nothing is late. Keeps four vectors, m, v, v̂ (which begins at v̂₀) and B, and the number of steps at each hand-out.
    """

    takes_mean_of_bucket = False
    vectors_of_run = ("momentum", "second_moment", "largest_second_moment", "gathered")
    vectors_moved = 3  # and eight more where a bucket is full

    def __init__(self, elements: int, coefficients: Coefficients) -> None:
        super().__init__(elements, coefficients)
        self.vectors["largest_second_moment"].fill_(coefficients.initial_second_moment)
        self.counters |= {"gathered": 0, "steps": 0, "delay_steps": 0}

    @override
    def stays_finite(self, params: torch.Tensor, norm: float, landing: Landing) -> bool:
        # How far a step moves w does not depend on the gradients: v̂ ≥ (1 − β₂)d² for each d so far, and m/(1 − β₁^n) is
        # no larger than the largest of them. So it is s/√(1 − β₂) at most, and where v̂ is below float32's numbers no
        # more than s · 2^-70/ε.
        return norm <= _LARGEST_NORM and super().stays_finite(params, 0.0, landing)

    @override
    def largest_element(self) -> float:
        return _LARGEST_ELEMENT

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        counters = self.counters
        delay_steps = counters["steps"] - counters.get(_steps_at(landing.slot), counters["steps"])
        counters["delay_steps"] = max(counters["delay_steps"], delay_steps)
        counters["gathered"] += 1
        if counters["gathered"] >= landing.bucket_size:
            self._step(params, gradient, landing.step_size)
            return
        for gathered, g in walk_gradient(self.vectors["gathered"], gradient=gradient):
            gathered.add_(g)

    def _step(self, params: torch.Tensor, gradient: Vector, step_size: float) -> None:
        counters, coefficients = self.counters, self.coefficients
        beta1, beta2 = coefficients.momentum, coefficients.second_momentum
        count, number, delay_steps = counters["gathered"], counters["steps"] + 1, counters["delay_steps"]
        step_size /= 1.0 - beta1**number
        if delay_steps > coefficients.delay_threshold:
            step_size /= delay_steps
        correction = math.sqrt(1.0 - beta2**number)
        for w, m, v, most, gathered, g in walk_gradient(
            params, *(self.vectors[name] for name in self.vectors_of_run), gradient=gradient
        ):
            mean = gathered.add_(g).div_(count)
            m.mul_(beta1).add_(mean, alpha=1.0 - beta1)
            v.mul_(beta2).addcmul_(mean, mean, value=1.0 - beta2)
            torch.maximum(most, v, out=most)
            w.addcdiv_(m, most.sqrt().div_(correction).add_(coefficients.epsilon), value=-step_size)
            gathered.zero_()
        counters |= {"gathered": 0, "steps": number, "delay_steps": 0}

    @override
    def ticket_handed_out(self, slot: SlotKey) -> None:
        self.counters[_steps_at(slot)] = self.counters["steps"]

    @override
    def slot_closed(self, slot: SlotKey) -> None:
        self.counters.pop(_steps_at(slot), None)


def _steps_at(slot: SlotKey) -> str:
    worker, number = slot
    return f"steps/{worker}/{number}"
