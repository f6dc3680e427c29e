"""Nesterov's momentum in the order of arrival: `naive` with a look ahead."""

import torch
from typing_extensions import override

from ormo_server.core.rules.base import Landing
from ormo_server.core.rules.naive import Naive
from ormo_server.core.vectors import walk


class NaiveNesterov(Naive):
    """m ← βm + sg, w ← w − sg − βm, for every gradient as it comes. Keeps one vector, m.

    What asynchronous local SGD with an outer Nesterov momentum does, and suffers from (Liu, Chhaparia, Douillard, Kale,
    Rusu, Shen, Szlam, Ranzato: Asynchronous Local-SGD Training for Language Modeling, arXiv 2401.09135).
    """

    @override
    def apply(self, params: torch.Tensor, gradient: torch.Tensor, landing: Landing) -> None:
        beta = self.coefficients.momentum
        for w, m, g in walk(params, self.vectors["momentum"], gradient):
            g = g.to(w.dtype)  # noqa: PLW2901
            m.mul_(beta).add_(g, alpha=landing.step_size)
            w.sub_(g, alpha=landing.step_size).sub_(m, alpha=beta)
