"""A `torch.optim.Optimizer` whose parameters live on a parameter server."""

import logging
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Never, Self, SupportsIndex

import torch
from torch import Tensor, nn

from ormo_protos.limits import MAX_SAMPLES, MAX_SLOTS
from ormo_protos.manifest import BFLOAT16, FLOAT32
from ormo_protos.refusals import UNSOUND_GRADIENT
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import Fields
from ormo_runtime.tls import Credentials
from ormo_worker.client import Delivered, Identity, ParameterClient, Patience
from ormo_worker.client.arguments import address, described, one_number, whole_number
from ormo_worker.errors import (
    ModelMismatch,
    ModelUnusable,
    OlderServer,
    OptionRefused,
    OrmoError,
    Refused,
    Replaced,
    RunFinished,
)
from ormo_worker.metrics import Exporter, WorkerMetrics
from ormo_worker.pytorch.devices import Copies
from ormo_worker.pytorch.groups import OPTIONS_OF_TORCH, SCALE, ParameterGroup, decays, refused_option
from ormo_worker.pytorch.module import frozen_in, unwrapped
from ormo_worker.pytorch.pipeline import Exchanged, Exchanges, Gathered, InFlight, OneAtATime
from ormo_worker.pytorch.transfer import Staging, Transfer
from ormo_worker.pytorch.watch import OnLocalChange, Watch, listed

_LOG = logging.getLogger(__name__)
_WIRE_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_FINAL_PULL_SECONDS = 3.0  # a server may well be gone once the run is over
# A gradient that was computed is worth delivering, but whoever stops a worker kills it soon: most give it 10 seconds.
_SETTLE_SECONDS = 5.0
_SECONDS_BETWEEN_WARNINGS = 10.0
_FIXED = (
    "which parameters are trained is decided for a run when its optimizer is made. Have all of them require gradients, "
    "and be in params=, before; or load the last checkpoint's model.safetensors into the model, and begin a new run "
    "with it, in another --directory"
)
# By plain model and server, for one that is made again, as by a cell of a notebook.
_made: "weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[RemoteOptimizer]]]" = weakref.WeakKeyDictionary()


class RemoteOptimizer(torch.optim.Optimizer):
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
    it after the model is on its device. It leaves the run when closed, at the end of the program, or when another is
    made for the same model at the same server. A fork of the process has no part in the run, and it can't be copied.

    With several gradients in flight, `step` hands the gradient to a thread and loads the parameters of another
    slot, so that the next gradient is computed while this one travels. What the server says of a gradient is
    then known some steps later; an error, too, is raised in a later step, and in each one after it.

    Args:
        model: parameters float32 or bfloat16; updated in place.
        server: HOST:PORT, where an ormo-server listens.
        params: parameters, named parameters or groups, as for any optimizer; all of the model's by default.
            Those left out are frozen, as those are that require no gradient when this is made: they travel once
            in each join, and are the same on all workers. A group may set `weight_decay_scale`.
        batch_size: samples that a step counts if it is not told; 1 by default.
        worker_id: 1 to 128 of the characters A-Z a-z 0-9 . _ -; made up by default.
        wire_dtype: torch.float32 or torch.bfloat16, for parameters and gradients on their way.
        in_flight: gradients that may be on their way, 1 to 16, each with a slot of its own; the server must
            allow as many, and its synchronous scheduler allows 1. More than 2 pay only if an exchange takes
            longer than a gradient. Each needs memory for two payloads.
        on_local_change: what a step does about parameters that the program has changed since the last one, and that it
            overwrites: "warn" of each once, or raise an "error".
        connect_timeout: seconds to wait for the server at first.
        failure_timeout: seconds without a byte after which the connection is made anew.
        give_up_after: seconds without a sign of life after which `step` fails; None to wait for ever.
        metrics_listen: HOST:PORT to serve this worker's own metrics on, for Prometheus; empty for none.
        credentials: files with certificates or a token to connect with; None for no TLS.

    Attributes:
        last_result: what the server said to the last gradient whose outcome is known, with several in flight not
            the last that was pushed; None before the first, and for one that was refused.
        counted: how many gradients the server is known to have counted: applied, or discarded as too late.
        iteration: gradients that the server had applied when it sent the parameters that the model has.
        finished: whether the run is over. The model then has the parameters and buffers that it ended with,
            if the server could still be asked for them.
        refusals: how many gradients were refused, by reason.

    Raises:
        ModelUnusable: the model can't be trained this way; the sentence names the tensor.
        CredentialsError: a certificate, key or token can't be used.
        OptionRefused: no module, an address that is none, an option that the server decides, a parameter of another
            model, a bad id, number or dtype, or an address for metrics that can't be had.
        ServerUnreachable: nobody answered within the connect timeout.
        ModelMismatch: the server trains another model.
        Refused: the server won't have this worker.
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
        on_local_change: OnLocalChange = "warn",
        connect_timeout: float = 60.0,
        failure_timeout: float = 30.0,
        give_up_after: float | None = None,
        metrics_listen: str = "",
        credentials: Credentials | None = None,
        **others: Never,
    ) -> None:
        _check_first(model, server, others)
        self._own = set(model.parameters())
        if not self._own:
            raise ModelUnusable("the model has no parameters: there is nothing to train")
        self._began = False
        self._process = os.getpid()
        super().__init__(model.parameters() if params is None else params, {SCALE: 1.0})
        self._began = True
        self._given = {parameter for group in self.param_groups for parameter in group["params"]}
        staging = Staging(model, (self._own - self._given) | frozen_in(model))
        self._batch_size = whole_number("batch_size", batch_size, 1, MAX_SAMPLES)
        self.last_result: pb.PushResult | None = None
        self.iteration = 0
        self.finished = False
        self.counted = 0
        self.refusals: Counter[str] = Counter()
        self._warned_at = float("-inf")
        self._loaded_at = 0.0
        self._joins = 0  # of which the model has the server's buffers
        self._gathered: Copies | None = None
        self._in_flight = whole_number("in_flight", in_flight, 1, MAX_SLOTS)
        self._dtype = _wire_dtype(wire_dtype)
        identity = Identity() if worker_id is None else Identity(worker_id)
        self._metrics = WorkerMetrics(identity.worker, staging.tensors.parameters[0].device)
        connect = partial(
            ParameterClient,
            server,
            worker_id=identity,  # the same for both tries: an older server waits for the model of the one that it asked
            slots=in_flight,
            wire_dtype=self._dtype,
            patience=Patience(connect_timeout, failure_timeout, give_up_after),
            observer=self._metrics,
            credentials=credentials,
        )
        watch = Watch(staging, on_local_change)
        self._place = (unwrapped(model), server)
        _close_older(*self._place)
        try:
            self._join(staging, watch, connect, metrics_listen)
        except OlderServer:
            _LOG.warning(
                "the server at %s does not know frozen parameters: in the run that it has, they travel too", server
            )
            whole = Staging(model, frozenset())
            self._join(whole, Watch(whole, on_local_change), connect, metrics_listen)

    def _join(
        self, staging: Staging, watch: Watch, connect: Callable[..., ParameterClient], metrics_listen: str
    ) -> None:
        """Join the run with this description of the model."""
        self._staging = staging
        self._watch = watch
        self._resting = [
            (name, parameter, parameter in self._given)
            for name, parameter in staging.tensors.named_frozen()
            if not parameter.requires_grad
        ]
        with_buffers = staging.tensors.has_buffers
        self._outgoing = tuple(self._transfer(self._dtype, with_buffers=with_buffers) for _ in range(self._in_flight))
        self._incoming: dict[int | None, Transfer] = {}
        self._client = connect(staging.tensors.manifest, model=staging.snapshot, pin_memory=staging.pinned)
        exporter = Exporter(metrics_listen, self._metrics.registry)
        slots, metrics = self._client.slots, self._metrics
        self._exchanges: Exchanges = OneAtATime(slots[0], metrics) if len(slots) == 1 else InFlight(slots, metrics)
        # Also at the end of the program.
        self._close = weakref.finalize(self, _close, self._exchanges, self._client, exporter)
        _remember(self, *self._place)  # not before there is something to close, nor after an interrupt may come
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
    def under_way(self) -> int:
        """Gradients that were pushed and whose outcome is not known yet; always below the number in flight."""
        return self._exchanges.under_way

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
            samples: in the mini-batch or, after accumulation, in all of them, 0 to 2**31 - 1; `batch_size` by default.
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
            raise OptionRefused(f"loss is {described(loss)}: expected one real number, the mini-batch's mean")
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
            if loss is None:  # a closure may return anything: other optimizers hand it on and look at none of it
                shown = one_number(returned)
        if self._resting:
            self._refuse_unfrozen()
        slot = self._exchanges.current
        if slot is None:  # an earlier step was interrupted while it waited: there is no ticket for this gradient
            self._take(self._exchanges.next())
        else:
            self._take(self._exchanges.swap(self._gather(slot, count, shown)))
        return returned

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For the groups that it is made with; later there is none to add, for the others are frozen.

        Raises:
            OptionRefused: the group has an option that the server decides, or a parameter that is not the
                model's, or the run has begun.
        """
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
            raise OptionRefused(f"a group of parameters came after the optimizer was made: {_FIXED}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the groups' options; there is no other state, for momentum and iterations are the server's.

        Raises:
            OptionRefused: the state is that of another optimizer.
        """
        for group in state_dict["param_groups"]:
            ParameterGroup(group)  # complains before anything changes
        super().load_state_dict(state_dict)
        self.param_groups = [ParameterGroup(group) for group in self.param_groups]

    def close(self) -> None:
        """Leave the run; may be called again, also after the run is over.

        Gradients in flight are waited for, some seconds at most.
        """
        self._close()
        if not self._client.inherited:
            self._settle(0.0)
            self._watch.end()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse to be copied or pickled.

        Raises:
            OrmoError: always.
        """
        raise OrmoError(
            "a RemoteOptimizer can't be copied or pickled: it is this process's place in the run. Make one where it is "
            "needed; state_dict() has the groups' options, and the server's checkpoints have all else"
        )

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
            raise self._explained(error) from None
        else:
            self._take(self._exchanges.start())

    def _explained(self, error: Refused) -> Refused:
        if self._in_flight == 1 or isinstance(error, Replaced):
            return error
        return Refused(f"{error}; this worker asks for {self._in_flight} slots because of --in-flight", error.reason)

    def _gather(self, slot: int, samples: int, loss: float | Tensor | None) -> Gathered:
        outgoing = self._outgoing[slot]
        weight_decay = self._client.welcome.settings.weight_decay
        scaled = decays(self.param_groups, self._staging.tensors.parameters, weight_decay)
        self._watch.parameters()
        self._watch.gradients(scaled)
        before, self._gathered = self._gathered, outgoing.begin_gradients(scaled)
        self._watch.given()
        return Gathered(
            payload=outgoing.payload,
            copies=self._gathered,
            samples=samples,
            loss=self._staging.fetch(loss).number if isinstance(loss, Tensor) else _known(loss),
            loaded_at=self._loaded_at,
            before=before,
        )

    def _refuse_unfrozen(self) -> None:
        """Parameters that no gradient goes out of must not look as if they were trained.

        Raises:
            ModelUnusable: one of them is not frozen any more.
        """
        for name, parameter, given in self._resting:
            # The gradient of one that is in no group is nobody's, and may have been there before.
            if parameter.requires_grad or (given and _moves(parameter.grad)):
                what = "requires a gradient" if parameter.requires_grad else "has a gradient"
                raise ModelUnusable(f"the parameter {name!r} {what}, and was frozen when the run began: {_FIXED}")

    def _take(self, exchanged: Exchanged) -> None:
        self._note(exchanged)
        if exchanged.outcome.delivered is not None:
            self._load(exchanged.slot, exchanged.outcome.delivered)
        if exchanged.outcome.finished:
            self._finish()

    def _note(self, exchanged: Exchanged) -> None:
        outcome = exchanged.outcome
        if exchanged.gathered is None:
            return
        self.last_result = outcome.result
        self.counted += outcome.result is not None
        if outcome.refusal is not None and not outcome.finished:
            self._note_refusal(outcome.refusal)

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
            self._note_mended(mended)
        self._joins = self._joins if delivered.joins is None else delivered.joins
        self._watch.loaded(incoming)
        self.iteration = delivered.iteration.number
        self._loaded_at = time.monotonic()

    def _settle(self, seconds: float) -> None:
        """Wait for gradients in flight, and note what became of those that are through."""
        self._exchanges.settle(seconds)
        for exchanged in self._exchanges.collected():
            self._note(exchanged)

    def _finish(self) -> None:
        self.finished = True
        self._settle(_FINAL_PULL_SECONDS)
        try:
            delivered = self._client.pull(within=_FINAL_PULL_SECONDS)
        except ModelMismatch:
            raise  # the run that is over was never this model's
        except OrmoError as error:
            _LOG.warning("the run is over, but its last parameters could not be loaded: %s", error)
            return
        if delivered is not None:
            self._load(None, delivered)

    def _note_refusal(self, refusal: pb.PushResult) -> None:
        self.refusals[refusal.refusal] += 1
        worker = self._client.identity.worker
        about = Fields(worker=worker, request=refusal.request, iteration=self.iteration, reason=refusal.refusal)
        if refusal.refusal not in UNSOUND_GRADIENT:
            said = "a gradient was lost, training goes on: %s: %s"
            _LOG.info(said, refusal.refusal, refusal.refusal_message, extra=about)
            return
        if self._may_warn():  # a loop that has diverged refuses every gradient
            count = self.refusals[refusal.refusal]
            said = "the server refused a gradient, %d so far: %s"
            _LOG.warning(said, count, refusal.refusal_message, extra=about)

    def _note_mended(self, buffers: list[str]) -> None:
        if self._may_warn():
            said = "buffers had NaN or infinity, and have the server's values again, as their gradients count: %s"
            _LOG.warning(
                said, listed(buffers), extra=Fields(worker=self._client.identity.worker, iteration=self.iteration)
            )

    def _may_warn(self) -> bool:
        now = time.monotonic()
        if now - self._warned_at < _SECONDS_BETWEEN_WARNINGS:
            return False
        self._warned_at = now
        return True

    def _transfer(self, dtype: pb.Dtype.ValueType, *, with_buffers: bool) -> Transfer:
        return self._staging.transfer(self._staging.payload(dtype, with_buffers=with_buffers))


def _close_older(model: nn.Module, server: str) -> None:
    remembered = _made.get(model, {}).get(server)
    older = None if remembered is None else remembered()
    if older is not None:
        older.close()


def _remember(optimizer: RemoteOptimizer, model: nn.Module, server: str) -> None:
    _made.setdefault(model, {})[server] = weakref.ref(optimizer)


def _close(exchanges: Exchanges, client: ParameterClient, exporter: Exporter) -> None:
    if client.inherited:  # a fork that ends must not leave in the name of its parent
        return
    try:
        exchanges.settle(_SETTLE_SECONDS)
    finally:  # an interrupted wait ends the rest all the sooner
        client.close()
        exchanges.stop()
        exporter.close()


def _check_first(model: object, server: object, others: Iterable[str]) -> None:
    """Have a sentence for who puts this in the place of another optimizer, arguments and all."""
    if not isinstance(model, nn.Module):
        raise OptionRefused(
            f"the model is a {type(model).__name__}: expected the torch.nn.Module itself, as in RemoteOptimizer(model, "
            "'HOST:PORT'); which of its parameters are trained is said with params="
        )
    for option in others:
        if option in OPTIONS_OF_TORCH:
            raise refused_option(option)
        raise TypeError(f"RemoteOptimizer() got an unexpected keyword argument {option!r}")
    address("server", server, lowest_port=1)


def _moves(gradient: Tensor | None) -> bool:
    """Whether another optimizer would use it: zeros are what `zero_grad(set_to_none=False)` leaves of an old one."""
    return gradient is not None and (gradient.is_sparse or bool(gradient.any()))


def _known(loss: float | None) -> Callable[[], float] | None:
    if loss is None:
        return None
    return lambda: loss


def _wire_dtype(dtype: torch.dtype) -> pb.Dtype.ValueType:
    if dtype not in _WIRE_DTYPES:
        raise OptionRefused(f"wire_dtype is {dtype}: expected torch.float32 or torch.bfloat16")
    return _WIRE_DTYPES[dtype]
