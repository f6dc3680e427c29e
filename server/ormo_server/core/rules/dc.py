"""Delay compensation (Zheng et al.: Asynchronous Stochastic Gradient Descent with Delay Compensation, ICML 2017)."""

import torch
from typing_extensions import override

from ormo_server.core.ids import SlotKey
from ormo_server.core.rules.base import LARGEST, LARGEST_STEP, Landing, UpdateRule
from ormo_server.core.vectors import Vector, largest, walk, walk_gradient


class DelayCompensated(UpdateRule):
    """w ← w − η(g + λ g⊙g⊙(w − w_ticket)): g is moved to where w is now by a diagonal guess at the Hessian.

    w_ticket is what went out with the ticket, as sent. Keeps one vector per slot: the last parameters sent to it.
    """

    vectors_per_slot = 1
    keeps_deliveries = True
    vectors_moved = 6  # two of them to see how far w has gone

    @override
    def stays_finite(self, params: torch.Tensor, norm: float, landing: Landing) -> bool:
        # The only rule that multiplies by w, so w must be looked at: a bound for any would refuse usual gradients.
        # Each product on the way to η λ g⊙g⊙(w − w_ticket) must be finite: a norm or η below 1 makes none smaller.
        distance = _largest_difference(params, self.vectors[_sent_to(landing.slot)])
        compensation = self.coefficients.delay_compensation * distance * max(1.0, norm) * max(1.0, norm)
        return max(1.0, landing.step_size) * (norm + compensation) <= LARGEST_STEP

    @override
    def largest_element(self) -> float:
        return LARGEST  # they are parameters

    @override
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        compensation = self.coefficients.delay_compensation
        for w, sent, g in walk_gradient(params, self.vectors[_sent_to(landing.slot)], gradient=gradient):
            # λ before g⊙g, which alone may be too large for float32: with λ = 0 this is plain SGD, whatever g.
            compensated = torch.sub(w, sent).mul_(compensation).mul_(g).mul_(g).add_(g)
            w.sub_(compensated, alpha=landing.step_size)

    @override
    def ticket_delivered(self, slot: SlotKey, sent: torch.Tensor) -> None:
        # The vector stays when the ticket is closed: the slot's next one needs it again.
        name = _sent_to(slot)
        if name not in self.vectors:
            self.vectors[name] = torch.empty(sent.shape, dtype=torch.float32, device="cpu")
        self.vectors[name].copy_(sent)

    @override
    def slot_closed(self, slot: SlotKey) -> None:
        self.vectors.pop(_sent_to(slot), None)


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return max(largest(each - its) for each, its in walk(one, other))


def _sent_to(slot: SlotKey) -> str:
    worker, number = slot
    return f"sent/{worker}/{number}"
