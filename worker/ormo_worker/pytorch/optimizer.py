"""A `torch.optim.Optimizer` whose parameters live on a parameter server."""

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Never, Self

import torch
from torch import Tensor, nn

from ormo_protos.limits import MAX_SAMPLES, MAX_SLOTS
from ormo_protos.refusals import Reason
from ormo_runtime.process import interrupted_safely
from ormo_runtime.tls import Credentials
from ormo_worker.client import Delivered, ExchangeOutcome, ParameterClient
from ormo_worker.client.arguments import Identity, Patience, whole_number
from ormo_worker.errors import (
    ModelMismatch,
    OlderServer,
    OrmoError,
    Refused,
    RunFinished,
)
from ormo_worker.metrics import Exporter, Tally, WorkerMetrics, note_not_finite
from ormo_worker.pytorch.devices import Copies
from ormo_worker.pytorch.figures import BatchFigures
from ormo_worker.pytorch.inner import Inner
from ormo_worker.pytorch.leaving import close_older, leave, remember
from ormo_worker.pytorch.local_steps import LocalSteps
from ormo_worker.pytorch.module import frozen_in, unwrap
from ormo_worker.pytorch.options import check_model_and_server, decays, wire_dtype_of
from ormo_worker.pytorch.parts import take_part
from ormo_worker.pytorch.pipeline import Gathered
from ormo_worker.pytorch.ranks import ranks_of, refuse_silent_group
from ormo_worker.pytorch.run_view import RunView
from ormo_worker.pytorch.transfer import Staging, Transfer
from ormo_worker.pytorch.watch import OnLocalChange, Watch, listed

_LOG = logging.getLogger(__name__)
_FINAL_PULL_SECONDS = 3.0  # a server may well be gone once the run is over


class RemoteOptimizer(RunView):
    """Pushes gradients to a parameter server and keeps the model at the parameters that come back.

    For example::

        with RemoteOptimizer(model, "server.example:50051", batch_size=32) as optimizer:
            while not optimizer.finished:
                optimizer.zero_grad()
                loss = loss_of(model, next(batches))
                loss.backward()
                optimizer.step(loss=loss)

    It takes the place of the optimizer in a training loop. Making it joins the run and loads the server's
    parameters, frozen ones too, and buffers into the model (or hands the server this model, if it has none);
    `step` pushes the gradients and loads newer parameters. Learning rate, momentum and weight decay are the
    server's.

    Closures, gradient clipping, gradient accumulation, `torch.amp.GradScaler`, frozen parameters, tied
    weights and parameters without a gradient work as with any optimizer. Use it from one thread, and make
    it after the model is on its device. It leaves the run when it is closed, when the program ends, or when another
    is made for the same model at the same server. A fork of the process has no part in the run, and the optimizer
    can't be copied.

    With several gradients in flight, `step` hands the gradient to a thread and loads the parameters of another
    slot, so that the next gradient is computed while this one travels. What the server says of a gradient is
    then known some steps later; an error, too, is raised in a later step, and in each one after it.

    With `inner`, each `step` is one of that optimizer's; every so many steps, as the server says, it pushes the sum
    of the moves, as it would a gradient. Groups and state are those of `inner`, and schedulers of torch work on it;
    closing pushes what was not pushed yet::

        inner = torch.optim.AdamW(model.parameters(), lr=3e-4)
        optimizer = RemoteOptimizer(model, "server.example:50051", inner=inner)
        schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda _: 1 - optimizer.progress)

    Args:
        model: the module to train, its parameters float32 or bfloat16; updated in place.
        server: HOST:PORT, where an ormo-server listens.
        params: parameters, named parameters or groups, as for any optimizer; all of the model's by default.
            Those left out are frozen, as are those that require no gradient when this is made: they travel once
            in each join, and are the same on all workers. A group may set `weight_decay_scale`.
        batch_size: samples that a step counts if it is not told; 1 by default.
        worker_id: 1 to 128 of the characters A-Z a-z 0-9 . _ -; made up by default.
        wire_dtype: torch.float32 or torch.bfloat16, for parameters and gradients on their way; or, with `inner`,
            torch.int8 for the sums of steps, rounded without bias, and bfloat16 for parameters.
        in_flight: gradients that may be on their way, 1 to 16, each with a slot of its own; the server must
            allow as many, and its synchronous scheduler allows 1. More than 2 pay only if an exchange takes
            longer than a gradient. Each needs memory for two payloads.
        inner: an optimizer of torch that makes this worker's steps, or several that together have each parameter
            once: for servers with local steps. A parameter that is in none stays with the other workers' moves.
        process_group: the ranks of torch.distributed that are this worker together, such as
            torch.distributed.group.WORLD, with the model in DistributedDataParallel. All of them make this optimizer
            and call its methods; rank 0 has the slots, pushes once for all of them, and gives the others what comes
            back. Numbers and errors are then the same in all ranks. None: this process is a worker by itself.
        on_local_change: what a step does about parameters that the program has changed since the last one, and that it
            overwrites: "warn" of each once, or raise an "error". With `inner` only frozen ones are looked at: what is
            done to the others between two steps is part of the move.
        connect_timeout: seconds to wait for the server at first.
        failure_timeout: seconds without a byte after which the connection is made anew.
        give_up_after: seconds without a sign of life after which `step` fails; None to wait for ever.
        metrics_listen: HOST:PORT to serve this worker's own metrics on, for Prometheus; empty for none.
        credentials: files with certificates or a token to connect with; None for no TLS.

    Attributes:
        iteration: gradients that the server had applied when it sent the parameters that the model has.
        finished: whether the run is over. The model then has the parameters and buffers that it ended with,
            if the server could still be asked for them.
        quiet_end: whether a step after the end of the run does nothing, instead of raising `RunFinished`: for trainers,
            which can't leave their loop at once. False at first.

    Raises:
        ModelUnusable: the model can't be trained this way; the sentence names the tensor.
        CredentialsError: a certificate, key or token can't be used.
        OptionRefused: `model` is no module, `server` no address, a parameter another model's, an option the server's,
            an id or number out of its limits, the dtype another one, the address for metrics not free, `inner` no
            such optimizer, or the model in DistributedDataParallel and no process group given.
        GroupBroken: another rank of the process group has ended, or does not answer within the group's timeout.
        ServerUnreachable: nobody answered within the connect timeout.
        ModelMismatch: the server trains another model.
        Refused: the server won't have this worker, such as one without `inner` in a run with local steps.
    """

    def __init__(
        self,
        model: nn.Module,
        server: str = "",
        *,
        params: Iterable[Any] | None = None,
        batch_size: int = 1,
        worker_id: str | None = None,
        wire_dtype: torch.dtype = torch.float32,
        in_flight: int = 1,
        inner: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        process_group: Any = None,
        on_local_change: OnLocalChange = "warn",
        connect_timeout: float = 60.0,
        failure_timeout: float = 30.0,
        give_up_after: float | None = None,
        metrics_listen: str = "",
        credentials: Credentials | None = None,
        **others: Never,
    ) -> None:
        check_model_and_server(model, server, others)
        self._process = os.getpid()
        super().__init__(model, params)
        given = {parameter for group in self.param_groups for parameter in group["params"]}
        if inner is not None:
            self.inner = Inner(inner, model, given)
        self._ranks = ranks_of(process_group)
        if process_group is None:
            refuse_silent_group(self._own)
        elif self._ranks is not None and not self._ranks.leads:
            metrics_listen = ""
        staging = Staging(model, (self._own - given) | frozen_in(model), self._ranks)
        self._batch_size = whole_number("batch_size", batch_size, 1, MAX_SAMPLES)
        self.iteration = 0
        self.finished = False
        self.quiet_end = False
        self._noted = BatchFigures()
        self._samples = 0  # counted by the run when it sent the parameters that the model has
        self._loaded_at = 0.0
        self._joins = 0  # of which the model has the server's buffers
        self._weight_decay = 0.0  # as the server had it at that join
        self._gathered: Copies | None = None
        self._in_flight = whole_number("in_flight", in_flight, 1, MAX_SLOTS)
        self._dtype = wire_dtype_of(wire_dtype, local_steps=inner is not None)
        identity = Identity() if worker_id is None else Identity(worker_id)
        self._tally = Tally(identity.worker)
        self._metrics = WorkerMetrics(identity.worker, staging.tensors.parameters[0].device)
        connect = partial(
            ParameterClient,
            server,
            worker_id=identity,  # the same for both tries: an older server waits for the model of the one that it asked
            slots=in_flight,
            wire_dtype=self._dtype,
            local_steps=inner is not None,
            patience=Patience(connect_timeout, failure_timeout, give_up_after),
            observer=self._metrics,
            credentials=credentials,
        )
        watching = partial(Watch, given=given, on_local_change=on_local_change, alone=process_group is None)
        self._place = (unwrap(model), server)
        close_older(*self._place)
        try:
            self._join(staging, watching(staging), connect, metrics_listen)
        except OlderServer:
            _LOG.warning(
                "the server at %s does not know frozen parameters: in its run, they travel as all others do", server
            )
            whole = Staging(model, frozenset(), self._ranks)
            self._join(whole, watching(whole), connect, metrics_listen)

    def _join(
        self, staging: Staging, watch: Watch, connect: Callable[..., ParameterClient], metrics_listen: str
    ) -> None:
        """Join the run with this description of the model."""
        self._staging = staging
        self._watch = watch
        self._outgoing = tuple(staging.outgoing(self._dtype) for _ in range(self._in_flight))
        self._incoming: dict[int | None, Transfer] = {}
        self._client, self._pipeline = take_part(connect, staging, self._metrics, self._ranks)
        exporter = Exporter(metrics_listen, self._metrics.registry)
        self._local = None
        self._local_steps: dict[int, int] = {}  # by slot, those that it pushed last
        if self.inner is not None:
            told = partial(note_not_finite, self._tally, self._metrics)
            self._local = LocalSteps(self.inner, staging, self._outgoing, self._pipeline, watch, told)
            self._local_steps = self._local.pushed
        # Also at the end of the program, and in whichever thread forgets the last reference: it may not know `self`.
        self._close = weakref.finalize(self, leave, self._pipeline, self._client, exporter, self._local)
        remember(self, *self._place)  # not before there is something to close, nor after an interrupt may come
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        samples: float | Tensor | None = None,
        loss: float | Tensor | None = None,
    ) -> Any:
        """Push the gradients, wait, and load the parameters that come back, or those that another slot has got.

        A gradient with values that are not finite is refused by the server: it is counted in `refusals`, and
        training goes on with newer parameters. So it does if the server has restarted or the network failed.

        Args:
            closure: computes the loss and its gradients, and returns the loss.
            samples: how many the mini-batch had or, after accumulation, all of them, 0 to 2**31 - 1; `batch_size` by
                default.
                A float or tensor will do if it is whole, such as a mask's sum.
            loss: the mini-batch's mean, to be shown; by default what the closure returned, if that is one number.

        Returns:
            What the closure returned.

        Raises:
            RunFinished: the run was over before this step; the step that finds out only sets `finished`.
            ParametersChanged: the program has changed parameters, and `on_local_change` is "error"; nothing was pushed.
            OptionRefused: samples or loss are no such numbers, or the ranks' gradients are not the same; nothing was
                pushed.
            GroupBroken: as when it is made; rank 0 leaves the run.
            OrmoError: what waiting and trying again can't mend.
        """
        if os.getpid() != self._process:
            self._client.check()  # raises: in a fork there is no thread that would exchange anything
        if self.finished and self.quiet_end:
            return None if closure is None else _called(closure)
        if self.finished:
            raise RunFinished(
                f"the run is over at iteration {self.iteration}: leave the training loop when `finished` is true"
            )
        figures = BatchFigures.checked(samples, loss)
        returned = None if closure is None else _called(closure)
        count, shown = figures.completed(self._noted, self._batch_size, returned)
        self._noted = BatchFigures()
        if self._watch.resting:
            self._watch.refuse_unfrozen()
        self._exchange(count, shown)
        return returned

    def note_batch(self, *, samples: float | Tensor | None = None, loss: float | Tensor | None = None) -> None:
        """Say what the next `step` counts and shows, where its caller can't: a trainer, or a wrapper of accelerate's.

        Args:
            samples: as for `step`, which goes by its own arguments first.
            loss: as for `step`.

        Raises:
            OptionRefused: they are no such numbers.
        """
        self._noted = BatchFigures.checked(samples, loss)

    @interrupted_safely
    def reload(self) -> None:
        """Put the server's parameters back into the model, over whatever the program has loaded there since.

        That is for programs that load a checkpoint of their own, whose weights are older. The next gradient is then of
        the parameters that it will count for. Gradients from before are dropped, and so are local steps that were not
        pushed; buffers become the server's; frozen parameters stay.

        Raises:
            OrmoError: what waiting and trying again can't mend.
        """
        held, mirror = self._watch.loaded, int(self._in_flight > 1)
        self.zero_grad()
        if held is None:  # an earlier step was interrupted while it waited: other parameters are to come
            if not self.finished:
                self._apply(self._pipeline.renew())
            return
        if self._staging.tensors.has_buffers and not held.payload.layout.with_buffers:
            newest = self._client.pull()
            if newest is not None:
                self._staging.transfer(newest.payload, mirror=mirror).load()
        held.load()
        self._watch.note_loaded(held)
        if self._local is not None:
            self._local.restart()

    def close(self) -> None:
        """Leave the run; may be called again, also after the run is over.

        Gradients in flight are waited for, some seconds at most.
        """
        self._close()
        if not self._client.inherited:
            self._settle(0.0)
            self._watch.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @interrupted_safely
    def _start(self) -> None:
        try:
            self._client.join()
        except RunFinished:
            self._came_too_late = True
            self._finish()
        except Refused as error:
            raise self._explain(error) from None
        else:
            self._apply(self._pipeline.start())

    def _explain(self, error: Refused) -> Refused:
        if self._in_flight == 1 or error.reason != Reason.BAD_REQUEST:
            return error
        return Refused(f"{error}; this worker asks for {self._in_flight} slots because of --in-flight", error.reason)

    @interrupted_safely  # not the closure: it may wait in ways that nothing of ours ends
    def _exchange(self, samples: int, loss: float | Tensor | None) -> None:
        if self._local is not None:
            self._take(self._local.step(samples, loss))
            return
        slot = self._pipeline.current
        if slot is None:  # an earlier step was interrupted while it waited: there is no ticket for this gradient
            self._apply(self._pipeline.next())
        else:
            self._apply(self._pipeline.swap(self._gather(slot, samples, loss)))

    def _gather(self, slot: int, samples: int, loss: float | Tensor | None) -> Gathered:
        outgoing = self._outgoing[slot]
        scaled = decays(self._groups, self._staging.tensors.parameters, self._weight_decay)
        # Before the gradient is packed: an error here leaves it, and the ticket, as they were.
        self._watch.check(scaled)
        # With one slot the gradient before was exchanged before these parameters came: there is no time to count twice.
        before = self._gathered if self._in_flight > 1 else None
        self._gathered = outgoing.begin_gradients(scaled)
        return Gathered(
            payload=outgoing.payload,
            copies=self._gathered,
            samples=samples,
            loss=self._staging.fetch_number(loss) if isinstance(loss, Tensor) else loss,
            loaded_at=self._loaded_at,
            before=before,
        )

    def _apply(self, outcome: ExchangeOutcome) -> None:
        """Bring the program up to date with what came: figures, parameters, the end of the run."""
        self._tally.note(outcome, self.iteration, self._local_steps.get(outcome.slot, 0))
        if outcome.delivered is not None:
            self._load(outcome.slot, outcome.delivered)
        if outcome.finished:
            self._finish()

    def _take(self, outcome: ExchangeOutcome | None) -> None:
        if outcome is not None:
            self._apply(outcome)
        elif self._client.finished:  # nobody takes the rest of these steps
            self._finish()

    def _load(self, slot: int | None, delivered: Delivered) -> None:
        incoming = self._incoming.get(slot)
        if incoming is None or incoming.payload is not delivered.payload:
            # With one slot nothing comes in before the gradient has left: one mirror serves both.
            incoming = self._staging.transfer(delivered.payload, mirror=int(self._in_flight > 1))
            self._incoming[slot] = incoming
        # Once a join: other slots bring the buffers, too, when the program has gone on with its own, and so does a
        # slot some of whose own the server did not take.
        mends = delivered.joins is not None and delivered.joins <= self._joins
        mended = incoming.load(mends=mends)
        if mended:
            self._tally.note_mended(listed(mended), self.iteration)
        if delivered.joins is not None and delivered.joins != self._joins:
            self._joins, self._weight_decay = delivered.joins, self._client.welcome.settings.weight_decay
        self._watch.note_loaded(incoming)
        if delivered.learning_rate is not None:
            self._show_rate(delivered.learning_rate)
        elif delivered.joins is not None:  # from an older server, which said it at the join
            self._show_rate(self.settings.learning_rate)
        self.iteration, self._samples = delivered.iteration.number, delivered.samples
        if self._local is not None and delivered.ticket is not None:  # else the run is over
            self._local.begin(delivered.ticket, most=self.settings.local_steps)
        self._loaded_at = time.monotonic()

    def _settle(self, seconds: float) -> None:
        """Wait for gradients in flight, and note what became of those that are through."""
        self._pipeline.settle(seconds)
        for outcome in self._pipeline.drain():
            self._tally.note(outcome, self.iteration, self._local_steps.get(outcome.slot, 0))

    def _finish(self) -> None:
        self.finished = True
        if self._local is not None:
            self._local.drop()
        self._settle(_FINAL_PULL_SECONDS)  # before the last parameters are asked for: these gradients may be in them
        try:
            delivered = self._client.pull(within=_FINAL_PULL_SECONDS)
        except ModelMismatch:
            raise  # the run that is over was never this model's
        except OrmoError as error:
            _LOG.warning("the run is over, but its last parameters could not be loaded: %s", error)
            return
        if delivered is not None:
            self._load(None, delivered)


def _called(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()
