"""Simulations as files: written down as they go, and read back from their directories."""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from ormo_protos.limits import INT8_BLOCK_ELEMENTS
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.settings import UsageError
from ormo_runtime.workload import Model, Scores
from ormo_server.core.machine import StateMachine
from ormo_server.core.state import PushResult, State
from ormo_server.sim.settings import TOLD_BY_TRACE, SimSettings

# What settings were that older summaries do not name.
_BEFORE: dict[str, Any] = {"delay_threshold": 2.0}
EVALUATIONS, DELAYS, SUMMARY = "evaluations.csv", "delays.csv", "summary.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation.

    Attributes:
        seconds: virtual time.
        gradients: applied so far.
        epochs: samples counted, in passes over the training data.
        batch_loss: mean loss of the mini-batches since the last row; not a number if there were none.
        train_loss, test_loss, test_accuracy: see `Scores`.
        learning_rate: η in force.
        delay_mean, delay_max: of the gradients applied since the last row.
        discarded: gradients not applied so far.
        newest_bucket: of any applied gradient.
        bucket_size: K.
        bytes_moved: tensors of gradients and of parameters with tickets, all workers', so far, in float32.
        int8_bytes_moved: the same, had the gradients been int8 and the parameters bfloat16.
        samples: counted so far.
        lag_mean: of the gradients applied since the last row, in buckets.
    """

    seconds: float
    gradients: int
    epochs: float
    batch_loss: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    learning_rate: float
    delay_mean: float
    delay_max: int
    discarded: int
    newest_bucket: int
    bucket_size: int
    bytes_moved: int = 0
    int8_bytes_moved: int = 0
    samples: int = 0
    lag_mean: float = math.nan


COLUMNS = tuple(column.name for column in fields(Row))
# Which versions that wrote the first digests did not count; they follow from the rest.
_LATER = ("bytes_moved", "int8_bytes_moved", "samples", "lag_mean")


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes of tensors, without those of buffers.

    Attributes:
        float32: of a gradient, or of parameters.
        int8: of a gradient in int8, with a float32 for each block of 1,024 numbers of a tensor.
        bfloat16: of parameters in bfloat16.
    """

    float32: int = 0
    int8: int = 0
    bfloat16: int = 0

    @classmethod
    def of(cls, model: Model) -> "Message":
        """What this model's messages have."""
        elements = model.params.numel()
        specs = () if model.manifest is None else model.manifest.tensors
        sizes = [spec.elements for spec in specs if spec.role == pb.ROLE_PARAMETER and not spec.alias_of] or [elements]
        blocks = sum(-(-size // INT8_BLOCK_ELEMENTS) for size in sizes)
        return cls(4 * elements, elements + 4 * blocks, 2 * elements)


@dataclass(slots=True)
class _SinceLastRow:
    losses: float = 0.0
    pushes: int = 0
    delays: int = 0
    lags: int = 0
    applied: int = 0
    delay_max: int = 0


@dataclass
class Record:
    """Everything that people want to know of one simulation.

    Attributes:
        epoch_samples: samples in one pass over the training data.
        on_row: is told of each row.
        on_gradient: is told of each gradient that was applied.
        rows: one per evaluation.
        delays: how many gradients were applied with each delay.
        discarded: gradients that were not applied.
        refusals: gradients that were not finite, or that were refused in the run that is followed.
        diverged: there were so many that no parameters can give a finite one.
        compute_seconds: of real time that gradients and evaluations took.
        message: how large messages are.
        pushes, deliveries: gradients that were sent, and tickets with parameters.
    """

    epoch_samples: int
    on_row: Callable[[Row], None] = lambda _: None
    on_gradient: Callable[[int], None] = lambda _: None
    rows: list[Row] = field(default_factory=list)
    delays: Counter[int] = field(default_factory=Counter)
    discarded: int = 0
    refusals: int = 0
    diverged: bool = False
    compute_seconds: float = 0.0
    message: Message = Message()
    pushes: int = 0
    deliveries: int = 0
    _since: _SinceLastRow = field(default_factory=_SinceLastRow)

    def computed(self, seconds: float) -> None:
        """A gradient was computed in so much real time."""
        self.compute_seconds += seconds

    def delivered(self) -> None:
        """A ticket was sent, with parameters."""
        self.deliveries += 1

    def pushed(self, result: PushResult, loss: float) -> None:
        """A gradient redeemed its ticket; the loss is its mini-batch's mean."""
        since = self._since
        self.pushes += 1
        since.losses += loss
        since.pushes += 1
        if result.discarded:
            self.discarded += 1
            return
        self.delays[result.delay] += 1
        since.delays += result.delay
        since.lags += result.lag_buckets
        since.applied += 1
        since.delay_max = max(since.delay_max, result.delay)
        self.on_gradient(result.iteration)

    def refused(self, *, diverged: bool) -> None:
        """A gradient was not finite, or nothing became of it in the run that is followed."""
        self.refusals += 1
        self.diverged = self.diverged or diverged

    def is_scored(self, iteration: int) -> bool:
        """Whether the last row is of this iteration."""
        return bool(self.rows) and self.rows[-1].gradients == iteration

    def evaluated(self, now: float, machine: StateMachine, scores: Scores, seconds: float) -> None:
        """The parameters were scored, in so much real time."""
        self.compute_seconds += seconds
        row = self._row(now, machine.state, machine.bucket_size, scores)
        self._since = _SinceLastRow()
        self.rows.append(row)
        self.on_row(row)

    def _row(self, now: float, state: State, bucket_size: int, scores: Scores) -> Row:
        since = self._since
        return Row(
            seconds=now,
            gradients=state.iteration,
            epochs=state.samples / self.epoch_samples,
            batch_loss=since.losses / since.pushes if since.pushes else math.nan,
            train_loss=scores.train_loss,
            test_loss=scores.test_loss,
            test_accuracy=scores.test_accuracy,
            learning_rate=state.learning_rate,
            delay_mean=since.delays / since.applied if since.applied else math.nan,
            delay_max=since.delay_max,
            discarded=self.discarded,
            newest_bucket=state.newest_bucket,
            bucket_size=bucket_size,
            bytes_moved=(self.pushes + self.deliveries) * self.message.float32,
            int8_bytes_moved=self.pushes * self.message.int8 + self.deliveries * self.message.bfloat16,
            samples=state.samples,
            lag_mean=since.lags / since.applied if since.applied else math.nan,
        )


def summary(record: Record, params: torch.Tensor, targets: Sequence[float]) -> dict[str, Any]:
    """The figures of a finished simulation, as JSON can hold them.

    Args:
        record: of the simulation, with one row at least.
        params: w at the end, shape (d,).
        targets: accuracies of which the virtual time to reach them is wanted.
    """
    last = record.rows[-1]
    return {
        "gradients": last.gradients,
        "epochs": last.epochs,
        "discarded": record.discarded,
        "refused": record.refusals,
        "diverged": record.diverged,
        "train_loss": _finite(last.train_loss),
        "test_loss": _finite(last.test_loss),
        "test_accuracy": last.test_accuracy,
        "best_test_accuracy": max(row.test_accuracy for row in record.rows),
        "virtual_seconds": last.seconds,
        "updates_per_virtual_second": last.gradients / last.seconds if last.seconds else None,
        "seconds_to_accuracy": {f"{target:g}": _reached(record.rows, target) for target in targets},
        "delay": _distribution(record.delays),
        "digest": digest(record, params),
    }


def digest(record: Record, params: torch.Tensor) -> str:
    """A fingerprint of all that a simulation led to: the same for the same seed, on one thread of one machine."""
    found = hashlib.sha256(params.numpy().tobytes())
    rows = [{name: value for name, value in asdict(row).items() if name not in _LATER} for row in record.rows]
    found.update(repr(rows).encode())
    found.update(repr(sorted(record.delays.items())).encode())
    return found.hexdigest()


class Directory:
    """Where a simulation's results go: rows as they come, the rest at the end.

    Raises:
        OSError: it can't be written to.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        # Its presence says that the simulation is complete.
        (path / SUMMARY).unlink(missing_ok=True)
        self.path = path
        self._rows = (path / EVALUATIONS).open("w", encoding="utf-8", newline="")
        self._table = csv.writer(self._rows)
        self._table.writerow(COLUMNS)

    def write_row(self, row: Row) -> None:
        """Append a row; it is in the file at once."""
        self._table.writerow(asdict(row).values())
        self._rows.flush()

    def complete(self, record: Record, found: Mapping[str, object]) -> None:
        """Write delays and summary."""
        self.close()
        with (self.path / DELAYS).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("delay", "gradients"))
            table.writerows(sorted(record.delays.items()))
        aside = self.path / (SUMMARY + ".part")
        aside.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(self.path / SUMMARY)

    def close(self) -> None:
        """Write no more rows."""
        self._rows.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _reached(rows: Sequence[Row], target: float) -> float | None:
    return next((row.seconds for row in rows if row.test_accuracy >= target), None)


def _distribution(delays: Counter[int]) -> dict[str, float | None]:
    total = delays.total()
    if not total:
        return dict.fromkeys(("mean", "median", "p90", "p99", "max"))
    ordered = sorted(delays.items())
    return {
        "mean": sum(delay * number for delay, number in ordered) / total,
        "median": _quantile(ordered, 0.5 * total),
        "p90": _quantile(ordered, 0.9 * total),
        "p99": _quantile(ordered, 0.99 * total),
        "max": ordered[-1][0],
    }


def _quantile(ordered: Sequence[tuple[int, int]], rank: float) -> int:
    below = 0
    for delay, number in ordered:
        below += number
        if below >= rank:
            return delay
    return ordered[-1][0]


class Delays(BaseModel):
    """Of the gradients that were applied; None if there were none."""

    mean: float | None
    max: int | None


def _under_new_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {SimSettings.renamed.get(name, name): value for name, value in recorded.items()}


class Summary(BaseModel):
    """What a simulation's summary says; see `record.summary` for the figures."""

    model_config = ConfigDict(frozen=True, extra="allow")

    settings: Annotated[dict[str, Any], AfterValidator(_under_new_names)]
    gradients: int
    epochs: float
    discarded: int
    refused: int
    diverged: bool
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float
    best_test_accuracy: float
    virtual_seconds: float
    delay: Delays
    digest: str


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """One simulation that came to its end.

    Attributes:
        path: the simulation's directory.
        summary: what its summary file says.
        method: its name, or what it is made of.
        rows: one per evaluation, at least one.
        delays: how many gradients were applied with each delay.
    """

    path: Path
    summary: Summary
    method: str
    rows: tuple[Row, ...]
    delays: Mapping[int, int]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was started with."""
        return self.summary.settings

    def gradients_to_loss(self, target: float) -> int | None:
        """How many gradients were applied at the first evaluation with this train loss or less."""
        return next((row.gradients for row in self.rows if row.train_loss <= target), None)

    def test_loss_at(self, clock: Callable[[Row], float], budget: float) -> float:
        """Test loss when the clock showed this: between two evaluations on a line, at the end if it never does."""
        before = self.rows[0]
        for row in self.rows:
            if clock(row) > budget:
                share = (budget - clock(before)) / (clock(row) - clock(before)) if row is not before else 0.0
                return before.test_loss + share * (row.test_loss - before.test_loss)
            before = row
        return before.test_loss

    def seconds_to_accuracy(self, target: float) -> float | None:
        """The virtual time of the first evaluation with this test accuracy or more."""
        return next((row.seconds for row in self.rows if row.test_accuracy >= target), None)


_ROWS = TypeAdapter(tuple[Row, ...])
_COUNTS = TypeAdapter(dict[int, int])


def read_run(path: Path) -> FinishedRun:
    """Read a simulation's directory.

    Raises:
        UsageError: it is not the directory of a simulation, or of one that is not finished, or its files are damaged.
    """
    if not (path / SUMMARY).is_file():
        what = "has no" if path.is_dir() else "is not a directory, so there is no"
        raise UsageError(f"{path} {what} {SUMMARY}: expected the directory of a finished simulation")
    try:
        summary = Summary.model_validate_json((path / SUMMARY).read_bytes())
        method = _settings_of(summary).run().method.name
        rows = _ROWS.validate_python(_table(path / EVALUATIONS))
        delays = _COUNTS.validate_python({row["delay"]: row["gradients"] for row in _table(path / DELAYS)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the results in {path} are damaged or of another version ({_first_line(error)}): run that simulation again"
        ) from error
    if not rows:
        raise UsageError(f"the results in {path} are damaged ({EVALUATIONS} has no row): run that simulation again")
    return FinishedRun(path, summary, method, rows, delays)


def _settings_of(summary: Summary) -> SimSettings:
    given = _BEFORE | summary.settings
    if given.get("trace") is not None:  # what that tells is written down with the rest, and nobody may give it
        given = {name: value for name, value in given.items() if name not in TOLD_BY_TRACE}
    return SimSettings(**given)


def as_written_now(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A summary's settings as `SimSettings.recorded` gives them today: earlier versions had other names, or none.

    What they did not have is as it is unless somebody sets it.
    """
    return SimSettings().recorded() | _BEFORE | _under_new_names(recorded)


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False)[0]
        where = ".".join(map(str, details["loc"]))
        return f"{error.title}, {where}: {details['msg']}" if where else details["msg"]
    return f"{type(error).__name__}: {error}"
