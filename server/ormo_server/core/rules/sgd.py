"""Plain stochastic gradient descent: w ← w − ηg."""

import torch
from typing_extensions import override

from ormo_server.core.rules.base import Landing, UpdateRule
from ormo_server.core.vectors import Vector, walk_gradient


class Sgd(UpdateRule):
    """w ← w − ηg. Under the asynchronous scheduler this is ASGD, under the synchronous one SSGD. Keeps no vector."""

    vectors_moved = 3

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        for w, g in walk_gradient(params, gradient=gradient):
            w.sub_(g, alpha=landing.step_size)
