"""The worker's, or a reader's, side of `ormo.v1.ParameterServer`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

from ormo_protos.limits import MAX_SLOTS
from ormo_protos.manifest import FLOAT32, FROZEN, Manifest
from ormo_protos.tensors import Chunk, Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tls import Credentials
from ormo_worker.client.arguments import Identity, Observer, Patience, address, whole_number
from ormo_worker.client.connection import Connection
from ormo_worker.client.membership import Membership, describe_model
from ormo_worker.client.messages import Delivered, DeliveryReceiver, Wanted, Wire, require_well_formed
from ormo_worker.client.retries import TryAgain
from ormo_worker.client.slot import Slot
from ormo_worker.errors import OrmoError


class ParameterClient:
    """A connection to a parameter server, which mends itself.

    As a reader it pulls parameters without a ticket. As a worker it joins the run, has a thread that keeps
    its lease, and exchanges gradients for parameters in its slots. Any thread may call it, but each slot is for one.

    Args:
        server: HOST:PORT.
        manifest: the model's; checked against the server's at every join.
        model: makes the payload of all of the model as it is now, in float32: asked for if the server
            has no model. None for readers, and for workers that should not offer theirs.
        worker_id: 1 to 128 of the characters A-Z a-z 0-9 . _ -; by default from the host's name, the
            process and chance. Or a whole identity, that of a client that is closed.
        slots: gradients that may be in flight, 1 to 16.
        wire_dtype: DTYPE_FLOAT32 or DTYPE_BFLOAT16, for parameters and gradients; DTYPE_INT8 for the sums of local
            steps, with parameters in bfloat16.
        local_steps: whether this worker makes local steps, and so wants a run that has them.
        pin_memory: whether payloads are received into page-locked memory.
        patience: how long to wait for the server.
        observer: is told what happens, from any thread.
        credentials: to connect with; None for no TLS.

    Raises:
        OptionRefused: the address, the worker id or the number of slots can't be used.
        CredentialsError: a certificate, key or token can't be used.
    """

    def __init__(
        self,
        server: str,
        manifest: Manifest,
        *,
        model: Callable[[], Payload] | None = None,
        worker_id: str | Identity | None = None,
        slots: int = 1,
        wire_dtype: pb.Dtype.ValueType = FLOAT32,
        local_steps: bool = False,
        pin_memory: bool = False,
        patience: Patience | None = None,
        observer: Observer | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        address("server", server, lowest_port=1)
        named = Identity() if worker_id is None else worker_id
        self.identity = named if isinstance(named, Identity) else Identity(named)
        self._wire = Wire(manifest, wire_dtype, pin_memory)
        self._connection = Connection(server, patience or Patience(), observer or Observer(), credentials)
        slots = whole_number("slots", slots, 1, MAX_SLOTS)
        self._membership = Membership(
            self._connection, self.identity, self._wire, slots, model or _no_model, local_steps=local_steps
        )
        self.slots = tuple(
            Slot(number, self._connection, self.identity, self._wire, self._membership) for number in range(slots)
        )
        self._receiver = DeliveryReceiver(self._wire)

    @property
    def welcome(self) -> pb.Welcome:
        """The server's answer to the last join.

        Raises:
            OrmoError: this client has not joined.
        """
        if self._membership.welcome is None:
            raise OrmoError("this client has not joined the run: call join() first")
        return self._membership.welcome

    @property
    def finished(self) -> bool:
        """Whether a heartbeat's answer said that the run is over."""
        return self._membership.finished

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that made the client, and so has no part in the run."""
        return self._connection.inherited

    def check(self) -> None:
        """Raise what stands against any further call.

        Raises:
            OrmoError: this client was closed or replaced, or this process is a fork.
        """
        self._connection.check()

    def join(self) -> pb.Welcome:
        """Join the run, and offer the model if the server asks for it; later joins happen by themselves.

        Raises:
            ServerUnreachable: nobody answered within the connect timeout.
            ModelMismatch: the server trains another model.
            RunFinished: the run is over.
            Refused: the server won't have this worker.
        """
        self._membership.ensure()
        return self.welcome

    def pull(
        self,
        *,
        newer_than: pb.Iteration | None = None,
        with_buffers: bool = True,
        within: float | None = None,
    ) -> Delivered | None:
        """The newest parameters, without a ticket; with the frozen tensors, if the last server's have not come yet.

        Args:
            newer_than: an iteration that is known already.
            with_buffers: whether to get the model's buffers, too.
            within: seconds after which to give up; None to go by the client's patience.

        Returns:
            None if there is nothing newer. The payload is overwritten by the next pull.

        Raises:
            ServerUnreachable: patience is at its end.
            Refused: the server won't send parameters.
        """
        known = self._membership.frozen_epoch

        def pulled(newer_than: pb.Iteration | None, *, with_frozen: bool) -> Delivered | None:
            wanted = self._wire.wanted[with_buffers, with_frozen]
            request = pb.PullParamsRequest(delivery=wanted.request, newer_than=newer_than)
            return self._connection.retry(lambda: self._pull(request, wanted), "pulling parameters", within=within)

        delivered = pulled(newer_than, with_frozen=known is None)
        if delivered is not None and self._wire.has_frozen and known not in (None, delivered.iteration.epoch):
            delivered = pulled(None, with_frozen=True)  # another server's may be others
        if delivered is not None and delivered.payload.layout.frozen:
            self._membership.frozen_epoch = delivered.iteration.epoch
        return delivered

    def frozen_names(self) -> set[str]:
        """Names of what the run has frozen; none if the server does not tell."""
        theirs = describe_model(self._connection)
        return set() if theirs is None else {spec.name for spec in theirs.tensors if spec.role == FROZEN}

    def read_as(self, manifest: Manifest) -> None:
        """From now on expect parameters of a model with this manifest; for readers."""
        self._wire = replace(self._wire, manifest=manifest)
        self._receiver = DeliveryReceiver(self._wire)

    def status(self) -> pb.GetStatusResponse:
        """How the run is.

        Raises:
            ServerUnreachable: patience is at its end.
            Refused: the server won't tell.
        """
        get_status = self._connection.stub.get_status
        return self._connection.retry(
            lambda: self._connection.unary(get_status, pb.GetStatusRequest()), "asking for the status"
        )

    def report(self, evaluation: pb.Evaluation, *, within: float) -> None:
        """Have the server show how good the parameters of an iteration are.

        Args:
            evaluation: what was found.
            within: seconds after which to give up.

        Raises:
            ServerUnreachable: that time is over.
            Refused: the server does not take it.
        """
        request = pb.ReportEvaluationRequest(evaluation=evaluation)
        method = self._connection.stub.report_evaluation
        self._connection.retry(
            lambda: self._connection.unary(method, request), "reporting an evaluation", within=within
        )

    def close(self) -> None:
        """Leave the run, and end all calls and threads; may be called again, and from another thread.

        In a fork of the process that made it nothing happens: that one is still there.
        """
        if self.inherited:
            return
        # In this order: streams end before the membership that they belong to, the server is told while there is a
        # channel to tell it through, and the heartbeat's thread is waited for when nothing can hold its last call up.
        for slot in self.slots:
            slot.close()
        self._membership.leave()
        self._connection.close()
        self._membership.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pull(self, request: pb.PullParamsRequest, wanted: Wanted) -> Delivered | None:
        complete = False
        with self._connection.errors_as_call_ended():
            call = self._connection.tensors.pull_params(request)
            with self._connection.guard(call):
                for answer in call:
                    self._connection.mark_alive()
                    if isinstance(answer, Chunk):
                        complete = self._receiver.accept(answer)
                        continue
                    delivery = require_well_formed(answer).message.delivery
                    if delivery.payload_bytes == 0 and request.HasField("newer_than"):
                        return None
                    self._receiver.begin(delivery, wanted)
        if not complete:
            raise TryAgain("the server ended the stream before the last parameter")
        return self._receiver.finish()


def _no_model() -> Payload:
    raise OrmoError(
        "the server has no model yet and asked this client for one; it has none: start the server with --model, or "
        "start a training worker first"
    )
