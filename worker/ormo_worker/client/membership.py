"""A worker's place in the run: joining, offering the model if the server has none, coming back, leaving."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ormo_protos.limits import MAX_CHUNK_BYTES
from ormo_protos.manifest import INT8, Manifest, ManifestError
from ormo_protos.refusals import Reason
from ormo_protos.tensors import Payload
from ormo_protos.v1 import PROTOCOL_VERSION
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import Fields
from ormo_runtime.process import interrupted_safely
from ormo_runtime.settings import LONGEST_SECONDS
from ormo_runtime.timeouts import FailureDetection
from ormo_worker.client.arguments import Identity
from ormo_worker.client.connection import Connection
from ormo_worker.client.messages import Outgoing, Wire, offer_messages, require_well_formed
from ormo_worker.client.protocol import Step
from ormo_worker.client.retries import CallEnded, TryAgain, Waiting, replaced_error
from ormo_worker.errors import ModelMismatch, ModelUnusable, OlderServer, OrmoError, ProtocolBroken, Refused

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_SHOWN_DIFFERENCES = 3
_OTHER_MODEL = "start this worker with the server's task, or name another server"
_OLDER_RUN = (
    "if it is the same model in a run that an older version began, which knew neither frozen parameters nor float64 "
    "buffers, continue with that version, or load the last checkpoint's model.safetensors into the model and begin a "
    "new run with it, in another --directory"
)
_LEAVE_SECONDS = 2.0  # a server that can't be reached finds out by itself


class Membership:
    """Joins when needed, and keeps the lease meanwhile.

    Three kinds of threads come here: each slot's before each exchange (`ensure`), the heartbeat's with what the server
    says meanwhile (`_on_lost`, `_on_finished`), and whichever thread closes the client (`leave`, `stop`). The lock is
    held while a join is under way, so that slots that lost their membership together join once; the heartbeat never
    takes it, or it could not end the calls that a join waits for.

    Args:
        connection: to the server, shared with the slots.
        identity: this worker's.
        wire: the messages of its model.
        slots: how many gradients this worker wants to have in flight.
        model: makes the payload of all of the model as it is now, in float32, for a server without one.
        local_steps: whether this worker makes local steps.

    Attributes:
        welcome: the server's answer to the last join; None before the first.
        joins: how often the worker has joined.
        finished: whether the server has said that the run is over.
        digest: what the server that was joined knows this model by.
        server_takes_data: whether a gradient may begin in the message that announces it.
        frozen_epoch: epoch of the server whose frozen tensors the model has; None before they came.
    """

    def __init__(
        self,
        connection: Connection,
        identity: Identity,
        wire: Wire,
        slots: int,
        model: Callable[[], Payload],
        *,
        local_steps: bool = False,
    ) -> None:
        self.welcome: pb.Welcome | None = None
        self.joins = 0
        self.finished = False
        self.digest = wire.manifest.model_digest
        self.server_takes_data = False
        self.frozen_epoch: int | None = None
        self._connection = connection
        self._identity = identity
        self._wire = wire
        self._model = model
        self._request = pb.JoinRequest(
            worker=identity.worker,
            incarnation=identity.incarnation,
            protocol_version=PROTOCOL_VERSION,
            slots=slots,
            model_digest=wire.manifest.model_digest,
            local_steps=local_steps,
        )
        self._is_member = False
        self._asked = False  # a Join is under way: who is interrupted then may be a member or not
        self._lock = threading.Lock()
        self._heartbeat = Heartbeat(connection, identity, self._on_lost, self._on_finished)

    def ensure(self) -> int:
        """Join unless that is done; any number of slots may call it at once.

        Returns:
            How often the worker has joined by now: what another number was true for is void.

        Raises:
            ModelMismatch: the server trains another model.
            ModelUnusable: the server asks for this model, and it has names that no run may begin with.
            OlderServer: the server does not know frozen parameters.
            RunFinished: the run is over.
            OrmoError: any other reason why joining can't succeed.
        """
        with self._lock:
            if not self._is_member:
                self.welcome = self._connection.retry(self._join, "joining the run")
                self.digest = self.welcome.manifest.digest or self._wire.manifest.model_digest
                self.server_takes_data = self.welcome.takes_data
                self.joins += 1
                # After `joins`: who reads them without the lock, as `lose` does, must not void the join that is new.
                self._is_member, self._asked = True, False
                if self.joins > 1:
                    self._connection.observer.note_rejoin()
                self._heartbeat.start(self.welcome.lease_seconds)
                self._log_welcome(self.welcome)
            return self.joins

    @property
    def lasts(self) -> bool:
        """Whether the worker is a member, as far as it knows."""
        return self._is_member

    @property
    def wants_frozen(self) -> bool:
        """Whether the frozen tensors of the server that was joined did not come yet."""
        return self.welcome is not None and self.welcome.iteration.epoch != self.frozen_epoch

    def lose(self, joins: int) -> None:
        """Note that the membership of that join is void, so that `ensure` joins again."""
        if joins == self.joins:
            self._is_member = False

    def leave(self) -> None:
        """Give the lease up, if there is one, as far as the server can be reached."""
        # Without the lock, which a join that the server does not answer may hold for as long as patience lasts.
        if not (self._is_member or self._asked) or self._connection.closed:
            return
        self._is_member = self._asked = False
        request = pb.LeaveRequest(worker=self._identity.worker, incarnation=self._identity.incarnation)
        try:
            self._connection.unary(self._connection.stub.leave, request, _LEAVE_SECONDS)
        except CallEnded as end:
            _LOG.info("leaving the run failed (%s): the lease runs out by itself", end)

    def stop(self) -> None:
        """End the heartbeats; the connection is closed before."""
        self._heartbeat.stop()

    def _join(self) -> pb.Welcome:
        self._asked = True
        try:
            answer = self._connection.unary(self._connection.stub.join, self._request)
        except CallEnded as end:
            self._asked = end.code == "CANCELLED"  # by an interrupt, perhaps after the server had taken it
            if end.reason != Reason.MANIFEST_DIGEST:
                raise
            raise self._mismatch(end.message, describe_model(self._connection)) from None
        self._asked = answer.HasField("welcome")
        match answer.WhichOneof("answer"):
            case "welcome":
                return self._check_welcome(answer.welcome)
            case "model_wanted":
                self._offer(answer.model_wanted)
                raise Waiting("the server has its model now")
            case "wait":
                raise Waiting("the server waits for its model from another worker", answer.wait.retry_seconds)
            case _:
                raise ProtocolBroken(
                    "the server answered Join with something that version 1 of the protocol does not know: are server "
                    "and worker of the same version?"
                )

    def _refuse_older(self) -> None:
        if self._wire.has_frozen:
            raise OlderServer(
                f"the server at {self._connection.server} is too old for frozen parameters, which this model has: "
                "upgrade the server, or create this optimizer again, which then sends them like all others"
            )

    def _check_welcome(self, welcome: pb.Welcome) -> pb.Welcome:
        try:
            _check_lease(welcome.lease_seconds)
            # Older servers tell it all, and count a worker before it knows what they train.
            if welcome.manifest.tensors:
                self._refuse_older()
                if welcome.manifest.digest not in self._wire.manifest.digests:
                    raise self._mismatch("", _read([welcome.manifest]))
            self._check_local_steps(welcome.settings.local_steps)
            self._check_int8(takes_it=welcome.takes_int8)
        except OrmoError:
            self.leave()
            raise
        return welcome

    def _check_local_steps(self, most: int) -> None:
        # At any join: the run that this worker comes back to may be another one.
        if self._request.local_steps and most < 1:
            raise Refused(
                f"the run at {self._connection.server} takes the gradient of each step, and this worker makes local "
                "steps: start ormo-server with --local-steps, or leave out inner= (--inner)",
                Reason.LOCAL_STEPS,
            )

    def _check_int8(self, *, takes_it: bool) -> None:
        if self._wire.dtype == INT8 and not takes_it:
            raise Refused(
                f"the server at {self._connection.server} does not know gradients in int8: upgrade it, or let this "
                "worker send bfloat16 (--wire-dtype bfloat16)",
                Reason.PROTOCOL_VERSION,
            )

    def _mismatch(self, message: str, theirs: Manifest | None) -> ModelMismatch:
        mine = self._wire.manifest
        differences = [] if theirs is None else mine.differences(theirs)
        if theirs is not None and mine.newer is not None and theirs.newer is None:
            message = f"{message or _OTHER_MODEL}; {_OLDER_RUN}"
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES]) or "which it does not describe"
        more = len(differences) - _SHOWN_DIFFERENCES
        return ModelMismatch(
            f"the server at {self._connection.server} trains another model than this worker has ({shown}"
            f"{f'; and {more} more' if more > 0 else ''}): "
            f"{message or _OTHER_MODEL}"
        )

    def _offer(self, wanted: pb.ModelWanted) -> None:
        manifest = self._manifest_to_offer(older=wanted.manifest_version < 1)
        payload = self._model()
        elements, size = self._wire.manifest.sizes["parameters"], payload.layout.total_bytes
        _LOG.info("the server has no model yet: offering this one, %d parameters, %d bytes", elements, size)
        requests = Outgoing(self._mark_moving(offer_messages(self._identity, manifest, payload)))
        try:
            with self._connection.errors_as_call_ended():
                call = self._connection.tensors.offer_model.future(iter(requests))
                with self._connection.guard(call):
                    call.result()
            self._connection.mark_alive()
        except CallEnded as end:
            requests.check()
            if end.step in (Step.JOIN, Step.SEND_AGAIN):  # whether it arrived is what the next Join tells
                raise TryAgain.after(end, "offering the model: ") from None
            raise end.error("the model that this worker offered") from None

    def _manifest_to_offer(self, *, older: bool) -> Manifest:
        manifest = self._wire.manifest
        try:
            manifest.check_names()
        except ManifestError as error:
            raise ModelUnusable(f"the server has no model yet, and would refuse this one: {error}") from None
        if not older:
            return manifest
        self._refuse_older()
        manifest = manifest.without_merges
        if manifest.newer is not None or manifest.to_message().ByteSize() > MAX_CHUNK_BYTES:
            what = "a longer list of tensors than one message holds"
            if manifest.newer is not None:
                what = f"{manifest.newer.name!r}, {manifest.newer.described()}"
            raise ModelUnusable(
                f"this model has {what}, which the server at {self._connection.server} is too old to accept: upgrade "
                "the server"
            )
        return manifest

    def _mark_moving(self, requests: Iterable[T]) -> Iterator[T]:
        """The requests; that the network takes one is a sign of life, however long the whole upload takes."""
        for request in requests:
            self._connection.mark_alive()
            yield request

    def _log_welcome(self, welcome: pb.Welcome) -> None:
        settings = welcome.settings
        _LOG.info(
            "joined the run at %s as %s (rank %d) at iteration %d: method %s, learning rate %g, momentum %g, "
            "weight decay %g%s",
            self._connection.server,
            self._identity.worker,
            welcome.rank,
            welcome.iteration.number,
            settings.method,
            settings.learning_rate,
            settings.momentum,
            settings.weight_decay,
            f", local steps {settings.local_steps}" if settings.local_steps else "",
            extra=Fields(worker=self._identity.worker, iteration=welcome.iteration.number),
        )

    def _on_lost(self) -> None:
        # An answer that was late may undo a join that came before it; joining twice does no harm.
        if self._is_member:
            _LOG.warning("the server no longer knows this worker: joining again")
            self._is_member = False
            self._connection.cancel_open()

    def _on_finished(self, iteration: pb.Iteration) -> None:
        if not self.finished:
            _LOG.info("the run is over at iteration %d", iteration.number)
        self.finished = True


@interrupted_safely
def describe_model(connection: Connection) -> Manifest | None:
    """The server's manifest; None if it can't be had.

    Raises:
        ProtocolBroken: it contradicts itself or the contract.
    """
    try:
        with connection.errors_as_call_ended():
            call = connection.tensors.describe_model(pb.DescribeModelRequest())
            with connection.guard(call):
                return _read(require_well_formed(answer).manifest for answer in call)
    except CallEnded:
        return None


def _read(parts: Iterable[pb.Manifest]) -> Manifest:
    try:
        return Manifest.from_messages(parts)
    except ManifestError as error:
        raise ProtocolBroken(f"the server's model can't be understood: {error}") from None


def _check_lease(seconds: float) -> None:
    if not 0 < seconds <= LONGEST_SECONDS:
        raise ProtocolBroken(f"the server grants a lease of {seconds} s: expected above 0, up to {LONGEST_SECONDS:g}")


class Heartbeat:
    """Sends heartbeats from its own thread while the worker computes or waits.

    From its own, because the others are busy: a gradient may take longer than the lease, and an exchange may wait for
    slower workers. It is also what finds out that the network has gone while they wait, and ends their calls.

    Args:
        connection: to the server.
        identity: the worker's.
        on_lost: called when the server no longer knows the worker.
        on_finished: called when the run is over.
    """

    def __init__(
        self,
        connection: Connection,
        identity: Identity,
        on_lost: Callable[[], None],
        on_finished: Callable[[pb.Iteration], None],
    ) -> None:
        self._connection = connection
        self._request = pb.HeartbeatRequest(worker=identity.worker, incarnation=identity.incarnation)
        self._on_lost = on_lost
        self._on_finished = on_finished
        self._lease_seconds = 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, lease_seconds: float) -> None:
        """Keep this lease from now on, with a new thread if there is none."""
        self._lease_seconds = lease_seconds
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ormo-heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread; its last call must not be in the way, so the connection is closed before."""
        self._stopped.set()
        # The garbage collector may close a client from any thread, this one included.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(FailureDetection(self._lease_seconds).heartbeat_seconds):
            try:
                self._beat()
            except OrmoError:  # closed, or stopped for a reason that the next exchange tells
                return

    def _beat(self) -> None:
        try:
            answer = self._connection.unary(
                self._connection.stub.heartbeat, self._request, FailureDetection(self._lease_seconds).heartbeat_seconds
            )
        except CallEnded as end:
            self._missed(end)
        else:
            if answer.finished:
                self._on_finished(answer.iteration)

    def _missed(self, end: CallEnded) -> None:
        _LOG.debug("a heartbeat failed: %s", end)
        if end.step is Step.JOIN:
            self._on_lost()
        elif end.step is Step.REPLACED:
            self._connection.stop_with(replaced_error(end.message))
        elif self._connection.silent_seconds >= self._lease_seconds:
            # Whoever waits for an answer would wait for ever if the network lost what was sent.
            self._connection.cancel_open()
