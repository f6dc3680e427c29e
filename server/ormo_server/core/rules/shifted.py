"""Shifted momentum (Giladi, Nacson, Hoffer, Soudry: At Stability's Edge, ICLR 2020, arXiv 1909.12340)."""

import torch
from typing_extensions import override

from ormo_server.core.ids import SlotKey
from ormo_server.core.rules.base import Landing, UpdateRule
from ormo_server.core.vectors import Vector, walk_gradient


class Shifted(UpdateRule):
    """Each slot k has a momentum of its own: u_k ← βu_k + ηg, w ← w − u_k. It starts at 0 for a newcomer.

    A slot pushes one gradient per ticket, so its momentum is always that of the moment at which its parameters were
    handed out: the momentum is shifted by the delay as the gradient is. Keeps one vector per slot, from the slot's
    first gradient until its worker is gone.
    """

    vectors_per_slot = 1
    vectors_moved = 5

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        name = _momentum_of(landing.slot)
        if name not in self.vectors:
            self.vectors[name] = torch.zeros_like(params)
        for w, u, g in walk_gradient(params, self.vectors[name], gradient=gradient):
            u.mul_(self.coefficients.momentum).add_(g, alpha=landing.step_size)
            w.sub_(u)

    @override
    def slot_closed(self, slot: SlotKey) -> None:
        self.vectors.pop(_momentum_of(slot), None)


def _momentum_of(slot: SlotKey) -> str:
    worker, number = slot
    return f"momentum/{worker}/{number}"
