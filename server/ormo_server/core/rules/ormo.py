"""Ordered momentum (Shi, Yang, Li: Ordered Momentum for Asynchronous SGD, NeurIPS 2024, arXiv 2407.19234)."""

import torch
from typing_extensions import override

from ormo_server.core.rules.base import Landing, UpdateRule, geometric_sum
from ormo_server.core.vectors import Vector, walk_gradient


class Ormo(UpdateRule):
    """A gradient enters the momentum with the weight that its bucket has by now, however late it comes.

    For a gradient of bucket j that moves the newest bucket by m and lags it by l (section 3 of the paper):

        w ← w − β(1 − β^m)/(1 − β) · u,  u ← β^m · u         when buckets open: all older gradients age by m
        u ← u + β^l · ηg                                     what the gradient's share of the momentum is by now
        w ← w − (1 − β^(l+1))/(1 − β) · ηg                   what that share has moved the parameters by now

    At any moment, over the applied gradients i:  u = Σ β^(b−j_i) η_i g_i  and
    w = w_0 − Σ (1 − β^(b−j_i+1))/(1 − β) · η_i g_i, whatever the order in which they came. Keeps one vector, u.
    """

    vectors_of_run = ("momentum",)
    vectors_moved = 5

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        beta, opened, lag = self.coefficients.momentum, landing.opened_buckets, landing.lag_buckets
        if opened == 1 and beta:
            self.take_momentum_step(params, gradient, landing.step_size)
            return
        aged, drift = beta**opened, self.drift_of_momentum(opened)
        share = landing.step_size * beta**lag
        moved = landing.step_size * self.moves_of_late_gradient(lag)
        for w, u, g in walk_gradient(params, self.vectors["momentum"], gradient=gradient):
            if opened:
                w.sub_(u, alpha=drift)
                u.mul_(aged)
            u.add_(g, alpha=share)
            w.sub_(g, alpha=moved)

    def drift_of_momentum(self, opened: int) -> float:
        """How many times its own length the momentum moves w as this many buckets open."""
        beta = self.coefficients.momentum
        return beta * geometric_sum(beta, opened)

    def take_momentum_step(self, params: torch.Tensor, gradient: Vector, step_size: float) -> None:
        """Apply a gradient in time that opens one bucket, as most do."""
        # With m = 1 and l = 0 the formula is u ← βu + ηg, w ← w − u: a pass over the memory less than its three lines.
        beta = self.coefficients.momentum
        for w, u, g in walk_gradient(params, self.vectors["momentum"], gradient=gradient):
            u.mul_(beta).add_(g, alpha=step_size)
            w.sub_(u)

    def moves_of_late_gradient(self, lag: int) -> float:
        """How many times its own length a gradient would have moved w by now, had it come in time."""
        return geometric_sum(self.coefficients.momentum, lag + 1)


class OrmoVanilla(Ormo):
    """OrMo whose last line is w ← w − ηg: a late gradient has its ordered share of the momentum from now on, but the
    parameters never get the moves that the momentum made before it came. Keeps one vector, u.
    """

    @override
    def moves_of_late_gradient(self, lag: int) -> float:
        return 1.0


class OrmoNesterov(Ormo):
    """Ordered Nesterov momentum: a gradient counts in the momentum as in `Ormo`, and w is that rule's w less βu. Ours.

    It is made of the order of `Ormo` and of Nesterov's momentum as `torch.optim.SGD(nesterov=True)` has it (Sutskever,
    Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning, ICML 2013).

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
    def take_momentum_step(self, params: torch.Tensor, gradient: Vector, step_size: float) -> None:
        # With m = 1 and l = 0 the formula is u ← βu + sg, w ← w − βu − sg.
        beta = self.coefficients.momentum
        for w, u, g in walk_gradient(params, self.vectors["momentum"], gradient=gradient):
            u.mul_(beta).add_(g, alpha=step_size)
            w.sub_(u, alpha=beta).sub_(g, alpha=step_size)
