"""Delayed Nesterov (Liu, Chhaparia, Douillard, Kale, Rusu, Shen, Szlam, Ranzato: Asynchronous Local-SGD Training for
Language Modeling, arXiv 2401.09135).
"""

import torch
from typing_extensions import override

from ormo_server.core.rules.base import LARGEST, Coefficients, Landing, UpdateRule
from ormo_server.core.vectors import Vector, walk_gradient


class DelayedNesterov(UpdateRule):
    """Between two steps of the momentum there are K plain ones, so that stale gradients do not come into it one by one.

        B ← B + sg,  w ← w − sg
        m ← βm + B,  w ← w − βm,  B ← 0        when K gradients are in B

    K is as it is when the gradient comes. Keeps two vectors, m and B, and the number of gradients in B.
    """

    vectors_of_run = ("momentum", "gathered")
    vectors_moved = 5  # and m twice where a bucket is full

    def __init__(self, elements: int, coefficients: Coefficients) -> None:
        super().__init__(elements, coefficients)
        self.counters["gathered"] = 0

    @override
    def largest_element(self) -> float:
        # B stays below (1 − β) of this, as u does in `base`, so m stays below it. It moves w once for all of K
        # gradients, and not on and on.
        return LARGEST / 2.0**26

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        beta, count = self.coefficients.momentum, self.counters["gathered"] + 1
        is_full = count >= landing.bucket_size
        for w, m, gathered, g in walk_gradient(
            params, self.vectors["momentum"], self.vectors["gathered"], gradient=gradient
        ):
            gathered.add_(g, alpha=landing.step_size)
            w.sub_(g, alpha=landing.step_size)
            if is_full:
                m.mul_(beta).add_(gathered)
                w.sub_(m, alpha=beta)
                gathered.zero_()
        self.counters["gathered"] = 0 if is_full else count
