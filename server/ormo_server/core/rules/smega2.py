"""SMEGA² (Cohen, Hakimi, Schuster: SMEGA2, Distributed Asynchronous Deep Neural Network Training With a Single
Momentum Buffer, ICPP 2022).
"""

import torch
from typing_extensions import override

from ormo_server.core.rules.base import Coefficients, Landing, Sending, UpdateRule
from ormo_server.core.vectors import Vector, walk, walk_gradient

# v holds gradients without η, and is multiplied by an η of later. It is a sum of means of gradients, βv + G/s, so by
# the argument of `LARGEST` it stays below 2^27 times the largest norm (|G|/s is at most e times that, for any s). With
# these two, ηβv is below LARGEST/2^26, and what is sent, where v counts ηβK times, is finite up to η = 2^20, K = 2^31.
_LARGEST_NORM = 2.0**40
_LARGEST_ELEMENT = 2.0**67
_LARGEST_STEP_SIZE = 2.0**33


class Smega2(UpdateRule):
    """One momentum v of whole buckets of gradients, and parameters sent to where they are expected to be used.

        G ← G + g,  s ← s + 1,  w ← w − η(g + βv)
        v ← βv + G/s,  G ← 0,  s ← 0                          when s ≥ K
        sent: w − ηβ[(K' + s(β − 1))v + (s/K')G],  K' = max(K, s)

    What is sent looks one bucket ahead: with K = 1 it follows Nesterov's accelerated gradient. Keeps two vectors, v
    and G, and the counter s.
    """

    takes_mean_of_bucket = False
    vectors_of_run = ("momentum", "gathered")
    vectors_moved = 6  # and v once more where a bucket is full

    def __init__(self, elements: int, coefficients: Coefficients) -> None:
        super().__init__(elements, coefficients)
        self.counters["gathered"] = 0

    @override
    def stays_finite(self, params: torch.Tensor, norm: float, landing: Landing) -> bool:
        in_bounds = norm <= _LARGEST_NORM and landing.step_size <= _LARGEST_STEP_SIZE
        return in_bounds and super().stays_finite(params, norm, landing)

    @override
    def largest_element(self) -> float:
        return _LARGEST_ELEMENT

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        beta, step = self.coefficients.momentum, landing.step_size
        count = self.counters["gathered"] + 1
        bucket_is_full = count >= landing.bucket_size
        for w, v, gathered, g in walk_gradient(
            params, self.vectors["momentum"], self.vectors["gathered"], gradient=gradient
        ):
            gathered.add_(g)
            w.sub_(g, alpha=step)
            w.sub_(v, alpha=step * beta)
            if bucket_is_full:
                v.mul_(beta).add_(gathered, alpha=1.0 / count)
                gathered.zero_()
        self.counters["gathered"] = 0 if bucket_is_full else count

    @override
    def write_delivery(
        self, params: torch.Tensor, out: torch.Tensor, sending: Sending, part: slice = slice(None)
    ) -> None:
        beta, count = self.coefficients.momentum, self.counters["gathered"]
        size = max(sending.bucket_size, count)
        ahead = sending.learning_rate * beta
        by_momentum, by_gathered = ahead * (size + count * (beta - 1.0)), ahead * count / size
        momentum, gathered = self.vectors["momentum"], self.vectors["gathered"]
        for w, v, partial, sent in walk(params[part], momentum[part], gathered[part], out[part]):
            expected = torch.sub(w, v, alpha=by_momentum)
            sent.copy_(expected.sub_(partial, alpha=by_gathered))
