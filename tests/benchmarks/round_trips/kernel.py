"""The update rules alone, beside a copy of as many bytes in the same process and the same moment."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from ormo_server.core.rules import UPDATE_RULES, Coefficients, Landing, UpdateRule

_SLOT = ("w", 0)


@dataclass(frozen=True)
class Update:
    """What a rule's update takes.

    Attributes:
        rule: its name.
        size: bytes of the model.
        opens: whether the gradient opens a bucket.
        ratios: its time by a copy's, for each pair.
        floor: the ratio of the bytes that it must move and those of a copy.
    """

    rule: str
    size: int
    opens: bool
    ratios: tuple[float, ...]
    floor: float


def measured(size: int, pairs: int) -> list[Update]:
    """All rules, on one thread."""
    torch.set_num_threads(1)
    return [
        Update(name, size, opens, _ratios(kind, size // 4, pairs, opens=opens), kind.vectors_moved / 2)
        for name, kind in UPDATE_RULES.items()
        for opens in ((False, True) if name.startswith("ormo") else (False,))
    ]


def _ratios(kind: type[UpdateRule], elements: int, pairs: int, *, opens: bool) -> tuple[float, ...]:
    rule = kind(elements, Coefficients(momentum=0.9, delay_compensation=0.04))
    params, gradient, out = torch.zeros(elements), torch.full((elements,), 1e-6), torch.zeros(elements)
    rule.ticket_delivered(_SLOT, params)
    landing = Landing(1e-3, int(opens), 0, 1 << 30, _SLOT)

    def update() -> None:
        rule.apply(params, gradient, landing)

    def copy() -> None:
        out.copy_(gradient)

    update()
    copy()
    return tuple(2 * _seconds(update) / (_seconds(copy) + _seconds(copy)) for _ in range(pairs))


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def line(update: Update) -> str:
    """A row of a Markdown table."""
    name = f"`{update.rule}`" + (", opening a bucket" if update.opens else "")
    low, high = min(update.ratios), max(update.ratios)
    return (
        f"| {name} | {update.size / 1e6:.0f} MB | {median(update.ratios):.2f} ({low:.2f}–{high:.2f}) | "
        f"{update.floor:.1f} |"
    )


HEADER = "| update | model | × a copy | bytes moved, × a copy's |\n| --- | --- | --- | --- |"
