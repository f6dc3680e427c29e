"""Ordered Nesterov momentum: OrMo (see `ormo`) whose parameters are always a move of the momentum ahead.

Ours. What it is made of: the order of Shi, Yang, Li (NeurIPS 2024), and the momentum of Nesterov in the form that
`torch.optim.SGD(nesterov=True)` has it (Sutskever, Martens, Dahl, Hinton: On the importance of initialization and
momentum in deep learning, ICML 2013).
"""

import torch
from typing_extensions import override

from ormo_server.core.rules.base import geometric_sum
from ormo_server.core.rules.ormo import Ormo
from ormo_server.core.vectors import walk


class OrmoNesterov(Ormo):
    """A gradient counts in the momentum as in `Ormo`; w is that rule's w less βu.

    For a gradient of bucket j that moves the newest bucket by m and lags it by l, with its step s = η · step scale:

        w ← w − β²(1 − β^m)/(1 − β) · u,  u ← β^m · u         when buckets open: all older gradients age by m
        u ← u + β^l · s g                                     what the gradient's share of the momentum is by now
        w ← w − (1 − β^(l+2))/(1 − β) · s g                   what it has moved by now, and βu in advance

    At any moment, over the applied gradients i:  u = Σ β^(b−j_i) s_i g_i  and
    w = w_0 − Σ (1 − β^(b−j_i+2))/(1 − β) · s_i g_i, whatever the order in which they came. With workers in step and η
    constant it is `torch.optim.SGD(nesterov=True)` on the sum of each bucket. Keeps one vector, u.
    """

    @override
    def drift_of_momentum(self, opened: int) -> float:
        return self.coefficients.momentum * super().drift_of_momentum(opened)

    @override
    def moves_of_late_gradient(self, lag: int) -> float:
        return geometric_sum(self.coefficients.momentum, lag + 2)

    @override
    def take_momentum_step(self, params: torch.Tensor, gradient: torch.Tensor, step_size: float) -> None:
        # With m = 1 and l = 0 the formula is u ← βu + sg, w ← w − βu − sg.
        beta = self.coefficients.momentum
        for w, u, g in walk(params, self.vectors["momentum"], gradient):
            g = g.to(w.dtype)  # noqa: PLW2901
            u.mul_(beta).add_(g, alpha=step_size)
            w.sub_(u, alpha=beta).sub_(g, alpha=step_size)
