"""Momentum in the order of arrival, as most asynchronous training has it (the paper's "naive ASGDm")."""

import torch
from typing_extensions import override

from ormo_server.core.rules.base import Landing, UpdateRule
from ormo_server.core.vectors import Vector, walk_gradient


class Naive(UpdateRule):
    """u ← βu + ηg, w ← w − u, for every gradient as it comes. Keeps one vector, u.

    The momentum ages with every gradient and not with every bucket, so with K workers a gradient has decayed to β^K
    of its weight by the time a worker sees what came of it, and a late one counts as if it were fresh.
    """

    vectors_of_run = ("momentum",)
    vectors_moved = 5

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        for w, u, g in walk_gradient(params, self.vectors["momentum"], gradient=gradient):
            u.mul_(self.coefficients.momentum).add_(g, alpha=landing.step_size)
            w.sub_(u)


class NaiveNesterov(Naive):
    """m ← βm + sg, w ← w − sg − βm, for every gradient as it comes. Keeps one vector, m.

    What asynchronous local SGD with an outer Nesterov momentum does, and suffers from (Liu, Chhaparia, Douillard, Kale,
    Rusu, Shen, Szlam, Ranzato: Asynchronous Local-SGD Training for Language Modeling, arXiv 2401.09135).
    """

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        beta = self.coefficients.momentum
        for w, m, g in walk_gradient(params, self.vectors["momentum"], gradient=gradient):
            m.mul_(beta).add_(g, alpha=landing.step_size)
            w.sub_(g, alpha=landing.step_size).sub_(m, alpha=beta)
