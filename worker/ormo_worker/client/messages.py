"""From tensors to messages and back, and who a worker is in them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from ormo_protos.framing import NOTHING, Headed
from ormo_protos.limits import CHUNK_BYTES, MAX_COMPUTE_SECONDS, MAX_SAMPLES
from ormo_protos.manifest import BFLOAT16, FLOAT32, INT8, Manifest
from ormo_protos.parsing import Malformed
from ormo_protos.tensors import Chunk, Payload, PayloadError, PayloadLayout, PayloadReceiver
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.client.arguments import Identity, real_number, whole_number
from ormo_worker.client.protocol import Ask
from ormo_worker.errors import ModelMismatch, OptionRefused, ProtocolBroken

A = TypeVar("A")
PushPullFrame: TypeAlias = Headed[pb.PushPullRequest] | Chunk
OfferFrame: TypeAlias = Headed[pb.OfferModelRequest] | Chunk


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient on its way out; its ticket is the slot's.

    Attributes:
        payload: the mean over the mini-batch with weight decay added, and the buffers if the model has any; it must not
            change before its exchange is over.
        samples: how many the mini-batch had, 0 to 2^31 - 1.
        loss: the mean over the mini-batch; None if not known.
        compute_seconds: from having the parameters to having the gradient, 0 to 1e9.
        local_steps: how many it is the sum of, in a run that has them; 0 in one without.

    Raises:
        OptionRefused: what no message can hold, or every server would refuse.
    """

    payload: Payload
    samples: int
    loss: float | None = None
    compute_seconds: float = 0.0
    local_steps: int = 0

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the plain numbers of tensors and of NumPy
        if type(self.samples) is not int or not 0 <= self.samples <= MAX_SAMPLES:
            set_(self, "samples", whole_number("samples", self.samples, 0, MAX_SAMPLES))
        if self.loss is not None and type(self.loss) is not float:
            set_(self, "loss", real_number("loss", self.loss))
        if type(self.compute_seconds) is not float:
            set_(self, "compute_seconds", real_number("compute_seconds", self.compute_seconds))
        if not 0 <= self.compute_seconds <= MAX_COMPUTE_SECONDS:
            raise OptionRefused(f"compute_seconds is {self.compute_seconds}: expected 0 to {MAX_COMPUTE_SECONDS:g}")


@dataclass(frozen=True, slots=True)
class Delivered:
    """Parameters that have arrived.

    Attributes:
        payload: overwritten by the next delivery of the same slot or reader.
        iteration: epoch of the server, and gradients that it had applied when it sent these parameters.
        ticket: the right to push one gradient computed at them; None for readers.
        samples: how many the run had counted by then.
        learning_rate: η in force then; None from servers that don't say it.
        joins: how often the worker had joined when it asked for them; None for readers.
    """

    payload: Payload
    iteration: pb.Iteration
    ticket: pb.Ticket | None
    samples: int
    learning_rate: float | None = None
    joins: int | None = None


class Wanted(NamedTuple):
    """How parameters are wanted.

    Attributes:
        request: as the server is asked for them; read only.
        layout: the one that the payload has to have that comes then.
    """

    request: pb.DeliveryRequest
    layout: PayloadLayout


@dataclass(frozen=True)
class Wire:
    """The messages of one model.

    Attributes:
        manifest: describes the model to the server.
        dtype: the number format in which gradients travel, and parameters: those come in bfloat16 where it is int8.
        pin_memory: whether received payloads lie in page-locked memory.
        wanted: by whether buffers, and whether frozen tensors, shall come along: they do only if the model has any.

    Raises:
        PayloadError: `dtype` is none in which gradients can travel.
    """

    manifest: Manifest
    dtype: pb.Dtype.ValueType = FLOAT32
    pin_memory: bool = False
    wanted: dict[tuple[bool, bool], Wanted] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Once, and not in each exchange: there are but four.
        both = (False, True)
        wanted = {(buffers, frozen): self._wanted(buffers, frozen) for buffers in both for frozen in both}
        object.__setattr__(self, "wanted", wanted)

    @property
    def has_frozen(self) -> bool:
        """Whether the model has frozen tensors."""
        return self.manifest.sizes["frozen"] > 0

    def _wanted(self, with_buffers: bool, with_frozen: bool) -> Wanted:
        sizes = self.manifest.sizes
        buffers = with_buffers and sizes["float_buffers"] + sizes["int_buffers"] > 0
        frozen = with_frozen and self.has_frozen
        dtype = BFLOAT16 if self.dtype == INT8 else self.dtype
        return Wanted(
            pb.DeliveryRequest(dtype=dtype, with_buffers=buffers, with_frozen=frozen),
            PayloadLayout.of(self.manifest, dtype, with_buffers=buffers, with_frozen=frozen),
        )

    def exchange_messages(
        self,
        identity: Identity,
        slot: int,
        ask: Ask,
        wanted: Wanted,
        gradient: Gradient | None,
        *,
        digest: bytes = b"",
        with_data: bool = False,
    ) -> Iterable[PushPullFrame]:
        """The messages of an exchange; the head is made at once, where the caller sees what is wrong with it.

        Args:
            identity: the worker's.
            slot: the slot's number.
            ask: what to send; the gradient goes along only if it names a ticket.
            wanted: how the next parameters are wanted, if they are.
            gradient: must not change until the exchange is over.
            digest: what the server knows the model by; by default the model's own.
            with_data: whether its first bytes may go with the first message.
        """
        requester = pb.Requester(
            worker=identity.worker, incarnation=identity.incarnation, slot=slot, request=ask.request
        )
        exchange = pb.Exchange(requester=requester)
        if ask.wants_next:
            exchange.next.CopyFrom(wanted.request)
            exchange.next.takes_data = True
        if ask.ticket is None or gradient is None:
            return (Headed(pb.PushPullRequest(exchange=exchange)),)
        payload = gradient.payload
        layout = payload.layout
        exchange.gradient.CopyFrom(
            pb.Gradient(
                ticket=ask.ticket,
                manifest_digest=digest or self.manifest.model_digest,
                dtype=layout.dtype,
                with_buffers=layout.with_buffers,
                payload_bytes=layout.total_bytes,
                samples=gradient.samples,
                loss=gradient.loss,
                compute_seconds=gradient.compute_seconds,
                local_steps=gradient.local_steps,
            )
        )
        data = payload.memory[:CHUNK_BYTES] if with_data else NOTHING
        head = Headed(pb.PushPullRequest(exchange=exchange), data)
        # A small gradient, which is all in the head, is one message: each hand-off to gRPC's thread costs more than it.
        return (head,) if len(data) == layout.total_bytes else chain((head,), payload.chunks(len(data)))


def offer_messages(identity: Identity, manifest: Manifest, payload: Payload) -> Iterator[OfferFrame]:
    """The messages that hand the server a model; the payload is float32 with buffers and frozen tensors."""
    parts = manifest.to_messages()
    who = pb.ModelOffer(worker=identity.worker, incarnation=identity.incarnation, manifest=next(parts))
    yield Headed(pb.OfferModelRequest(offer=who))
    for part in parts:
        yield Headed(pb.OfferModelRequest(more=part))
    yield from payload.chunks()


class Outgoing(Generic[A]):
    """Messages for a thread of gRPC's, which would make a lost connection of what goes wrong while they are made.

    They end where one fails, and the call with them; whoever waits for its answer calls `check` then.
    """

    def __init__(self, messages: Iterable[A]) -> None:
        self._messages = messages
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[A]:
        try:
            yield from self._messages
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's to see
            self._failure = error

    def check(self) -> None:
        """Raise what went wrong, if anything has."""
        if self._failure is not None:
            raise self._failure


def require_well_formed(answer: A | Malformed) -> A:
    """What the server sent.

    Raises:
        ProtocolBroken: it is no message, or too large a one.
    """
    if isinstance(answer, Malformed):
        raise malformed(answer)
    return answer


def malformed(answer: Malformed) -> ProtocolBroken:
    """The error for bytes that are no message, or too large a one."""
    return ProtocolBroken(f"the server sent a message that can't be understood: {answer.why}")


class DeliveryReceiver:
    """Takes deliveries in, one after the other, into memory that is used again.

    Attributes:
        ticket: the one that came with the delivery that has begun; None if it came without.
    """

    def __init__(self, wire: Wire) -> None:
        self.ticket: pb.Ticket | None = None
        self._wire = wire
        self._payload: Payload | None = None
        self._delivery = pb.Delivery()
        self._receiver: PayloadReceiver | None = None

    def begin(self, delivery: pb.Delivery, wanted: Wanted) -> None:
        """Read the first message of a delivery that was asked for in this way.

        Raises:
            ModelMismatch: it is of another model.
            ProtocolBroken: it is not what was asked for.
        """
        digest = delivery.model_digest or delivery.manifest_digest
        if digest not in self._wire.manifest.digests:
            raise ModelMismatch(
                f"the server announced parameters of the model with digest {digest[:8].hex()}…, but this model's is "
                f"{self._wire.manifest.model_digest[:8].hex()}…: give the server and this program the same model"
            )
        asked, layout = wanted
        came = (delivery.dtype, delivery.with_buffers, delivery.with_frozen, delivery.payload_bytes)
        expected = (asked.dtype, asked.with_buffers, asked.with_frozen, layout.total_bytes)
        if came != expected:
            raise ProtocolBroken(
                f"the server announced parameters as (dtype, with buffers, with frozen ones, bytes) = {came}, but this "
                f"model's are {expected}: give the server and this program the same model"
            )
        self._delivery = delivery
        self.ticket = delivery.ticket if delivery.HasField("ticket") else None
        # The first delivery after a join has buffers and the others do not: two kinds are never kept at once.
        if self._payload is None or self._payload.layout != layout:
            self._payload = None
            # Page-locked memory is kept by PyTorch once it is free: what comes once must not stay for ever.
            self._payload = Payload(layout, pin_memory=self._wire.pin_memory and not layout.frozen)
        self._receiver = PayloadReceiver(self._payload)

    def accept(self, chunk: Chunk) -> bool:
        """Take a piece; True if it was the last one.

        Raises:
            ProtocolBroken: it is not the next piece of a delivery that has begun.
        """
        if self._receiver is None:
            raise ProtocolBroken("the server sent a chunk of parameters without announcing any")
        try:
            return self._receiver.accept(chunk).complete
        except PayloadError as error:
            raise ProtocolBroken(f"the server sent parameters that can't be used: {error}") from None

    def finish(self, joins: int | None = None) -> Delivered:
        """What has arrived, once `accept` has said that it is complete; `joins` is passed on."""
        receiver, self._receiver = self._receiver, None
        assert receiver is not None
        said = self._delivery
        rate = said.learning_rate if said.HasField("learning_rate") else None
        return Delivered(receiver.payload, said.iteration, self.ticket, said.samples, rate, joins)
