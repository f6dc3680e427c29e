"""A `torch.optim.Optimizer` whose parameters live on a parameter server."""

import logging
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Never, Self

import torch
from torch import Tensor, nn

from ormo_protos.limits import MAX_SAMPLES, MAX_SLOTS
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tls import Credentials
from ormo_runtime.workload import share_of_run
from ormo_worker.client import Delivered, ExchangeOutcome, ParameterClient
from ormo_worker.client.arguments import Identity, Patience, describe, one_number, whole_number
from ormo_worker.errors import (
    ModelMismatch,
    ModelUnusable,
    OlderServer,
    OptionRefused,
    OrmoError,
    Refused,
    RunFinished,
)
from ormo_worker.metrics import Exporter, Tally, WorkerMetrics, note_not_finite
from ormo_worker.pytorch.devices import Copies
from ormo_worker.pytorch.groups import Grouped
from ormo_worker.pytorch.inner import Inner
from ormo_worker.pytorch.leaving import close_older, leave, remember
from ormo_worker.pytorch.local_steps import LocalSteps
from ormo_worker.pytorch.module import frozen_in, unwrap
from ormo_worker.pytorch.options import SCALE, ParameterGroup, check_model_and_server, decays, wire_dtype_of
from ormo_worker.pytorch.pipeline import Gathered, InFlight, OneAtATime, Pipeline
from ormo_worker.pytorch.transfer import Staging, Transfer
from ormo_worker.pytorch.watch import FIXED, OnLocalChange, Watch, listed

_LOG = logging.getLogger(__name__)
_FINAL_PULL_SECONDS = 3.0  # a server may well be gone once the run is over


class RemoteOptimizer(Grouped):
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

    Raises:
        ModelUnusable: the model can't be trained this way; the sentence names the tensor.
        CredentialsError: a certificate, key or token can't be used.
        OptionRefused: `model` is no module, `server` no address, a parameter another model's, an option the server's,
            an id or number out of its limits, the dtype another one, the address for metrics not free, or `inner` no
            such optimizer.
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
        on_local_change: OnLocalChange = "warn",
        connect_timeout: float = 60.0,
        failure_timeout: float = 30.0,
        give_up_after: float | None = None,
        metrics_listen: str = "",
        credentials: Credentials | None = None,
        **others: Never,
    ) -> None:
        check_model_and_server(model, server, others)
        self._own = set(model.parameters())
        if not self._own:
            raise ModelUnusable("the model has no parameters: there is nothing to train")
        self._began = False
        self._process = os.getpid()
        super().__init__(model.parameters() if params is None else params, {SCALE: 1.0})
        self._began = True
        given = {parameter for group in self.param_groups for parameter in group["params"]}
        if inner is not None:
            self.inner = Inner(inner, model, given)
        staging = Staging(model, (self._own - given) | frozen_in(model))
        self._batch_size = whole_number("batch_size", batch_size, 1, MAX_SAMPLES)
        self.iteration = 0
        self.finished = False
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
        watch = Watch(staging, given, on_local_change)
        self._place = (unwrap(model), server)
        close_older(*self._place)
        try:
            self._join(staging, watch, connect, metrics_listen)
        except OlderServer:
            _LOG.warning(
                "the server at %s does not know frozen parameters: in its run, they travel as all others do", server
            )
            whole = Staging(model, frozenset())
            self._join(whole, Watch(whole, given, on_local_change), connect, metrics_listen)

    def _join(
        self, staging: Staging, watch: Watch, connect: Callable[..., ParameterClient], metrics_listen: str
    ) -> None:
        """Join the run with this description of the model."""
        self._staging = staging
        self._watch = watch
        with_buffers = staging.tensors.has_buffers
        self._outgoing = tuple(
            staging.transfer(staging.payload(self._dtype, with_buffers=with_buffers)) for _ in range(self._in_flight)
        )
        self._incoming: dict[int | None, Transfer] = {}
        self._client = connect(staging.tensors.manifest, model=staging.snapshot, pin_memory=staging.pinned)
        exporter = Exporter(metrics_listen, self._metrics.registry)
        slots, metrics = self._client.slots, self._metrics
        self._pipeline: Pipeline = OneAtATime(slots[0], metrics) if len(slots) == 1 else InFlight(slots, metrics)
        self._local = None
        self._local_steps: dict[int, int] = {}  # by slot, those that it pushed last
        if self.inner is not None:
            told = partial(note_not_finite, self._tally, metrics)
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

    @property
    def rank(self) -> int:
        """The smallest number from 0 up that no other worker had when this one joined."""
        return self._client.welcome.rank

    @property
    def data_seed(self) -> int:
        """A number from 0 to 2**64 - 1 for the order of this worker's data: no other join has the same."""
        return self._client.welcome.data_seed

    @property
    def settings(self) -> pb.RunSettings:
        """How the server trains."""
        return self._client.welcome.settings

    @property
    def progress(self) -> float:
        """How much of the run was over when it sent the parameters that the model has, 0 to 1.

        By gradients or by samples, whichever ends it first; 0 throughout where neither does.
        """
        return 1.0 if self.finished else share_of_run(self.settings, self.iteration, self._samples)

    @property
    def last_result(self) -> pb.PushResult | None:
        """What the server said to the last gradient whose outcome is known; None before, and for a refused one.

        With several in flight that is not the one that was pushed last.
        """
        return self._tally.last_result

    @property
    def counted(self) -> int:
        """How many gradients the server is known to have counted: applied, or discarded as too late."""
        return self._tally.counted

    @property
    def refusals(self) -> Counter[str]:
        """How many gradients were refused, by reason."""
        return self._tally.refusals

    @property
    def under_way(self) -> int:
        """Gradients that were pushed and whose outcome is not known yet; always fewer than `in_flight`."""
        return self._pipeline.under_way

    @property
    def left(self) -> bool:
        """Whether it has left the run, as it has once it is closed."""
        return not self._close.alive

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
            OptionRefused: samples or loss are no such numbers; nothing was pushed.
            OrmoError: what waiting and trying again can't mend.
        """
        if os.getpid() != self._process:
            self._client.check()  # raises: in a fork there is no thread that would exchange anything
        if self.finished:
            raise RunFinished(
                f"the run is over at iteration {self.iteration}: leave the training loop when `finished` is true"
            )
        count = self._batch_size if samples is None else whole_number("samples", samples, 0, MAX_SAMPLES)
        shown = one_number(loss)
        if loss is not None and shown is None:
            raise OptionRefused(f"loss is {describe(loss)}: expected one real number, the mini-batch's mean")
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
            if loss is None:  # a closure may return anything: other optimizers hand it on and look at none of it
                shown = one_number(returned)
        if self._watch.resting:
            self._watch.refuse_unfrozen()
        if self._local is not None:
            self._take(self._local.step(count, shown))
            return returned
        slot = self._pipeline.current
        if slot is None:  # an earlier step was interrupted while it waited: there is no ticket for this gradient
            self._apply(self._pipeline.next())
        else:
            self._apply(self._pipeline.swap(self._gather(slot, count, shown)))
        return returned

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For the groups that it is made with; later there is none to add, for the others are frozen.

        Raises:
            OptionRefused: the group has an option that the server decides, or a parameter that is not the
                model's, or the run has begun.
        """
        if self.inner is not None:
            raise OptionRefused("a group of parameters was added to RemoteOptimizer: add it to the inner optimizer")
        super().add_param_group(ParameterGroup(param_group))
        strangers = [p for p in self.param_groups[-1]["params"] if p not in self._own]
        if strangers:
            self.param_groups.pop()
            raise OptionRefused(
                f"a parameter of shape {tuple(strangers[0].shape)} is not one of the model's: give the optimizer "
                "the model that it belongs to"
            )
        if self._began:
            self.param_groups.pop()
            raise OptionRefused(f"a group of parameters was added after the optimizer was made: {FIXED}")

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

    def _start(self) -> None:
        try:
            self._client.join()
        except RunFinished:
            self._finish()
        except Refused as error:
            raise self._explain(error) from None
        else:
            self._apply(self._pipeline.start())

    def _explain(self, error: Refused) -> Refused:
        if self._in_flight == 1 or error.reason != Reason.BAD_REQUEST:
            return error
        return Refused(f"{error}; this worker asks for {self._in_flight} slots because of --in-flight", error.reason)

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
