"""`ormo-worker evaluate`: how good a run's parameters are, while it goes on."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime import logs
from ormo_runtime.process import leave_if_asked
from ormo_runtime.tls import Credentials
from ormo_runtime.tracking import Tracking, refuse_unusable_tracker
from ormo_worker.client.api import ParameterClient
from ormo_worker.client.arguments import Observer, Patience, real_number
from ormo_worker.client.messages import Delivered
from ormo_worker.errors import ModelMismatch, OrmoError
from ormo_worker.figures import RunRows, settings_of
from ormo_worker.metrics import EvaluatorMetrics, Exporter
from ormo_worker.pytorch.devices import resolve_device
from ormo_worker.pytorch.transfer import Staging
from ormo_worker.settings import EvaluateSettings
from ormo_worker.tasks import Score, Task, load_task
from ormo_worker.tasks.batches import evaluation_batches, to_device

_LOG = logging.getLogger(__name__)
_REPORT_SECONDS = 5.0  # the next evaluation is worth more than a report of this one
_SECONDS_BETWEEN_LOOKS = 1.0  # so that the end of a run is noticed soon, however rare the evaluations


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The test set's verdict on one iteration's parameters.

    Attributes:
        epoch: number of the server start that had these parameters.
        iteration: gradients that were applied to these parameters.
        samples: that the run had counted by then.
        score: the model's, on the whole test set.
        seconds: how long it took to compute.
    """

    epoch: int
    iteration: int
    samples: int
    score: Score
    seconds: float

    def facts(self) -> dict[str, int | float]:
        """What its line on stdout says, for people and programs."""
        return {
            "iteration": self.iteration,
            "loss": self.score.mean_loss,
            "accuracy": self.score.accuracy,
            "seconds": self.seconds,
            "samples": self.samples,
        }

    def to_message(self) -> pb.Evaluation:
        """The evaluation, as it is reported to the server."""
        accuracy = real_number("accuracy", self.score.accuracy)
        return pb.Evaluation(
            iteration=pb.Iteration(epoch=self.epoch, number=self.iteration),
            loss=real_number("loss", self.score.mean_loss),
            accuracy=None if math.isnan(accuracy) else accuracy,  # a test set without samples
        )


def run(settings: EvaluateSettings) -> None:
    """Print a line, and tell the server, for each evaluation until the run is over.

    Raises:
        TaskError: the task or its data can't be used.
        UsageError: there is no such tracker, or it could not be made.
        OptionRefused: the device is not there, or the metrics' port is not free.
        OrmoError: the server can't be reached, or trains another model.
    """
    torch.set_num_threads(settings.threads)
    if settings.track:
        refuse_unusable_tracker(settings.track)
    task = load_task(settings.task, settings.data_dir)
    evaluator = Evaluator(task, resolve_device(settings.device), settings.batch_size)
    metrics = EvaluatorMetrics()
    exporter = Exporter(settings.metrics_listen, metrics.registry)
    patience = Patience(
        settings.connect_timeout_seconds, settings.failure_timeout_seconds, settings.give_up_after_seconds
    )
    try:
        with (
            evaluator.client(settings.server, patience, metrics, settings.credentials()) as client,
            _followed(settings, client) as rows,
        ):
            for evaluation in evaluations(
                evaluator, client, settings.every_seconds, once=settings.once, on_status=rows.look
            ):
                logs.announce("evaluation", evaluation.facts(), settings.log_format)
                metrics.note_evaluation(evaluation.iteration, evaluation.seconds)
                score = evaluation.score
                rows.evaluated(evaluation.iteration, evaluation.samples, score.mean_loss, score.accuracy)
                _report(client, evaluation)
    finally:
        exporter.close()


@contextlib.contextmanager
def _followed(settings: EvaluateSettings, client: ParameterClient) -> Iterator[RunRows]:
    """Rows for the tracker that the settings name, if they do."""
    if not settings.track:
        yield RunRows(())
        return
    tracking = Tracking(settings.track, {"task": settings.task} | settings_of(client.status()))
    try:
        yield RunRows((tracking,))
    finally:
        tracking.close()


def _report(client: ParameterClient, evaluation: Evaluation) -> None:
    """Tell the server. It shows evaluations and needs none: what it does not take is not worth more than a line."""
    try:
        client.report(evaluation.to_message(), within=_REPORT_SECONDS)
    except OrmoError as error:
        _LOG.info("the server does not show the evaluation of iteration %d: %s", evaluation.iteration, error)


def evaluations(
    evaluator: "Evaluator",
    client: ParameterClient,
    every_seconds: float,
    *,
    once: bool = False,
    on_status: Callable[[pb.GetStatusResponse], None] = lambda _: None,
) -> Iterator[Evaluation]:
    """Evaluate each time that there is something newer, and for the last time when the run is over.

    Args:
        evaluator: the task's model and test set.
        client: a reader of the run's server.
        every_seconds: time from the beginning of an evaluation to that of the next.
        once: whether the first evaluation is the last.
        on_status: is told of each look at the server.
    """
    known: pb.Iteration | None = None
    due_at = time.monotonic()
    while True:
        leave_if_asked()
        status = client.status()
        on_status(status)
        over = status.phase == pb.GetStatusResponse.PHASE_FINISHED
        if (over or time.monotonic() >= due_at) and status.phase != pb.GetStatusResponse.PHASE_WAITING_FOR_MODEL:
            due_at = time.monotonic() + every_seconds
            delivered = evaluator.pull(client, known)
            if delivered is not None:
                known = delivered.iteration
                yield evaluator.evaluate(delivered)
            if over or once:
                return
        time.sleep(max(0.0, min(_SECONDS_BETWEEN_LOOKS, due_at - time.monotonic())))


class Evaluator:
    """A task's model and test set.

    Raises:
        TaskError: the data can't be used.
    """

    def __init__(self, task: Task, device: torch.device, batch_size: int) -> None:
        self._task = task
        self._device = device
        self._batch_size = batch_size
        self._model: nn.Module = task.build_model().to(device).eval()
        self._test_set = task.test_set()
        self._staging = Staging(self._model)

    def client(
        self,
        server: str,
        patience: Patience,
        observer: Observer | None = None,
        credentials: Credentials | None = None,
    ) -> ParameterClient:
        """A reader of this model's parameters."""
        manifest, pin_memory = self._staging.tensors.manifest, self._staging.device is not None
        return ParameterClient(
            server, manifest, pin_memory=pin_memory, patience=patience, observer=observer, credentials=credentials
        )

    def pull(self, client: ParameterClient, newer_than: pb.Iteration | None) -> Delivered | None:
        """The newest parameters; None if there are none newer than those that are known.

        To a reader it is all the same which of the parameters the run trains: this one describes its model as the
        server does.

        Raises:
            OrmoError: as `ParameterClient.pull`.
        """
        try:
            return client.pull(newer_than=newer_than)
        except ModelMismatch:
            frozen = client.frozen_names()
            named = self._model.named_parameters(remove_duplicate=False)
            self._staging = Staging(self._model, {parameter for name, parameter in named if name in frozen})
            client.read_as(self._staging.tensors.manifest)
            return client.pull(newer_than=newer_than)

    @torch.no_grad()
    def evaluate(self, delivered: Delivered) -> Evaluation:
        """Score these parameters on the whole test set."""
        started = time.monotonic()
        self._staging.transfer(delivered.payload).load()
        score = Score()
        for batch in evaluation_batches(self._test_set, self._batch_size):
            score += self._task.score(self._model, to_device(batch, self._device))
        epoch, iteration = delivered.iteration.epoch, delivered.iteration.number
        return Evaluation(epoch, iteration, delivered.samples, score, time.monotonic() - started)
