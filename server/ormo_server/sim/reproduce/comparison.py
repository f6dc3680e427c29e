"""What the cells of a comparison say: each method's best rate, and how it does there."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ormo_server.sim.record import FinishedRun, Row
from ormo_server.sim.reproduce.suite import Cell, Cluster, Point, Suite

Runs = Mapping[Cell, FinishedRun]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample deviation; the deviation is None for a single value.

    Attributes:
        mean, deviation: of the values.
        count: of values.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """The spread of these values; None if there are none."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.mean(values), deviation, len(values))


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        runs: all of them.
        sound: those that did not diverge.
    """

    runs: tuple[FinishedRun, ...]
    sound: tuple[FinishedRun, ...]

    @property
    def diverged(self) -> int:
        """How many diverged."""
        return len(self.runs) - len(self.sound)

    @property
    def train_loss(self) -> Spread | None:
        """Final train loss of those that did not diverge."""
        return Spread.of([run.summary.train_loss for run in self.sound if run.summary.train_loss is not None])

    @property
    def test_accuracy(self) -> Spread | None:
        """Final test accuracy of all: a run that diverged counts with what it has."""
        return Spread.of([run.summary.test_accuracy for run in self.runs])

    @property
    def test_loss(self) -> Spread | None:
        """Final test loss of those that did not diverge."""
        return Spread.of([run.summary.test_loss for run in self.sound if run.summary.test_loss is not None])

    def test_loss_at(self, clock: Callable[[Row], float], budget: float) -> Spread | None:
        """Test loss by the time that a clock shows this; at the end, where it does not get there."""
        return Spread.of([run.test_loss_at(clock, budget) for run in self.sound])

    @property
    def bytes_moved(self) -> Spread | None:
        """How many bytes those moved that did not diverge."""
        return Spread.of([run.rows[-1].bytes_moved for run in self.sound])

    @property
    def virtual_seconds(self) -> Spread | None:
        """How long those took that did not diverge."""
        return Spread.of([run.summary.virtual_seconds for run in self.sound])

    @property
    def delay_mean(self) -> float | None:
        """Mean delay of applied gradients."""
        means = [run.summary.delay.mean for run in self.runs if run.summary.delay.mean is not None]
        return statistics.mean(means) if means else None

    @property
    def delay_max(self) -> int | None:
        """The largest delay of an applied gradient."""
        return max((run.summary.delay.max for run in self.runs if run.summary.delay.max is not None), default=None)

    def reached(self, measure: Callable[[FinishedRun], float | None]) -> Spread | None:
        """How soon those that reached a target did; None if no run did."""
        return Spread.of([value for value in map(measure, self.runs) if value is not None])


@dataclass(frozen=True, slots=True)
class Entry:
    """A method on a cluster.

    Attributes:
        cluster, method: which.
        grid: runs on the grid; those that failed are missing.
        best_point: the best; None if all failed.
        at_edge: whether its total move is at an edge of the grid, so that a better one may lie outside.
        best: the reported runs, at the best rate.
        reference_rate: the best rate of the reference method; None if that is not compared.
        at_reference: runs at that rate.
    """

    cluster: Cluster
    method: str
    grid: Mapping[Point, FinishedRun]
    best_point: Point | None
    at_edge: bool
    best: Group
    reference_rate: float | None
    at_reference: Group

    @property
    def rate(self) -> float | None:
        """η of the best point."""
        return None if self.best_point is None else self.best_point.rate


class Comparison:
    """What a suite led to, as far as it has run.

    Args:
        suite: what is compared.
        runs: by cell; those that failed, or have not run yet, are missing.
    """

    def __init__(self, suite: Suite, runs: Runs) -> None:
        self.suite = suite
        self.runs = runs

    def has_diverged(self, run: FinishedRun) -> bool:
        """Whether a run came to nothing: its numbers were not finite, or it ends no better than guessing."""
        loss, limit = run.summary.train_loss, self.suite.diverged_loss
        return run.summary.diverged or loss is None or (limit is not None and loss >= limit)

    def best_point(self, cluster: Cluster, method: str) -> Point | None:
        """The point of the grid with the lowest train loss at the end; of equal ones, and if all diverged, the lowest.

        Train loss, because test samples that chose the rate could not be used to report on it.
        """
        found = self._on_grid(cluster, method)
        return min(found, key=lambda point: (self._loss_at_end(found[point]), point), default=None)

    def best_rate(self, cluster: Cluster, method: str) -> float | None:
        """η there."""
        best = self.best_point(cluster, method)
        return None if best is None else best.rate

    def cells_beyond_edges(self) -> list[Cell]:
        """One more cell of the grid for each method that is best at an edge, as far as the suite goes beyond it."""
        cells = []
        for cluster, method in self.suite.groups():
            best = self.best_point(cluster, method)
            beyond = None if best is None else self._beyond(cluster, method, best)
            if beyond is not None:
                cells.append(self.suite.cell(cluster, method, beyond, self.suite.grid_seed))
        return cells

    def _beyond(self, cluster: Cluster, method: str, best: Point) -> Point | None:
        tried, told = self._moves_tried(cluster, method, best), self.suite.rates(cluster)
        farthest = 2.0**self.suite.widened
        if len(tried) > 1 and best.total_move == tried[-1] < told[-1] * farthest:
            return self.suite.point(2.0 * best.total_move, best.momentum)
        if len(tried) > 1 and best.total_move == tried[0] > told[0] / farthest:
            return self.suite.point(best.total_move / 2.0, best.momentum)
        return None

    def _moves_tried(self, cluster: Cluster, method: str, best: Point) -> list[float]:
        """On the grid with that momentum, rising."""
        return sorted(point.total_move for point in self._on_grid(cluster, method) if point.momentum == best.momentum)

    def _loss_at_end(self, run: FinishedRun) -> float:
        losses = [row.train_loss for row in run.rows[-self.suite.choice_evaluations :]]
        return math.inf if self.has_diverged(run) or not all(map(math.isfinite, losses)) else statistics.mean(losses)

    def reference_rate(self, cluster: Cluster) -> float | None:
        """The best rate of the reference method."""
        point = self._reference_point(cluster)
        return None if point is None else point.rate

    def _reference_point(self, cluster: Cluster) -> Point | None:
        reference = self.suite.reference
        return self.best_point(cluster, reference) if reference in self.suite.methods_on(cluster) else None

    def report_cells(self) -> list[Cell]:
        """The cells that follow from those on the grid: new seeds at the best rates."""
        cells: dict[Cell, None] = {}
        for cluster, method in self.suite.groups():
            points = [self.best_point(cluster, method)]
            if self.suite.repeat_at_reference_rate:
                points.append(self._reference_point(cluster))
            cells |= dict.fromkeys(self._cells(cluster, method, points, self.suite.report_seeds))
        return list(cells)

    def entries(self) -> list[Entry]:
        """A row for each cluster and method."""
        return [self._entry(cluster, method) for cluster, method in self.suite.groups()]

    def _entry(self, cluster: Cluster, method: str) -> Entry:
        suite = self.suite
        best, reference = self.best_point(cluster, method), self._reference_point(cluster)
        tried = [] if best is None else self._moves_tried(cluster, method, best)
        seeds = suite.report_seeds if suite.repeat_at_reference_rate else (suite.grid_seed,)
        return Entry(
            cluster=cluster,
            method=method,
            grid=self._on_grid(cluster, method),
            best_point=best,
            at_edge=best is not None and len(tried) > 1 and best.total_move in (tried[0], tried[-1]),
            best=self._group(self._cells(cluster, method, [best], suite.report_seeds)),
            reference_rate=self.reference_rate(cluster),
            at_reference=self._group(self._cells(cluster, method, [reference], seeds)),
        )

    def _on_grid(self, cluster: Cluster, method: str) -> dict[Point, FinishedRun]:
        seed = self.suite.grid_seed
        return {
            cell.point: run
            for cell, run in self.runs.items()
            if (cell.cluster, cell.method, cell.seed) == (cluster.name, method, seed)
        }

    def _cells(self, cluster: Cluster, method: str, points: Sequence[Point | None], seeds: Sequence[int]) -> list[Cell]:
        known = [point for point in points if point is not None]
        return [self.suite.cell(cluster, method, point, seed) for point in known for seed in seeds]

    def _group(self, cells: Sequence[Cell]) -> Group:
        runs = tuple(self.runs[cell] for cell in cells if cell in self.runs)
        return Group(runs, tuple(run for run in runs if not self.has_diverged(run)))
