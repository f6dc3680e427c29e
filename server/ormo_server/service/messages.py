"""Between the wire's messages and the core's words: checks of single fields, and nothing that needs state."""

import math
import re
from collections.abc import Iterator
from itertools import chain
from typing import TypeVar

from ormo_protos.framing import NOTHING, Frame, Headed
from ormo_protos.int8 import Int8Vector
from ormo_protos.limits import MAX_COMPUTE_SECONDS, MAX_SAMPLES, WORKER_ID, WORKER_ID_IN_WORDS
from ormo_protos.manifest import INT8, Manifest
from ormo_protos.parsing import Malformed
from ormo_protos.tensors import Chunk, Payload, PayloadLayout
from ormo_protos.v1 import PROTOCOL_VERSION
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.errors import BadPayload, BadRequest, LocalSteps, ManifestDigest, OrmoError, ProtocolVersion
from ormo_server.core.ids import TicketKey
from ormo_server.core.state import PushResult
from ormo_server.journal import Storing
from ormo_server.metrics.view import Evaluation
from ormo_server.service.admission import ReceivedGradient
from ormo_server.service.delivery import Delivery
from ormo_server.service.refusals import not_understood

M = TypeVar("M", pb.PushPullRequest, pb.PushGradientRequest, pb.OfferModelRequest)
R = TypeVar("R", pb.PushPullResponse, pb.PullParamsResponse)

_WORKER_ID = re.compile(WORKER_ID)


def check_worker_id(text: str) -> None:
    """Refuse what is no worker id.

    Raises:
        BadRequest: it is empty, too long or has other characters than the contract allows.
    """
    if not _WORKER_ID.fullmatch(text):
        raise BadRequest(f"worker id {text[:160]!r}: expected {WORKER_ID_IN_WORDS}")


def ticket_key(message: pb.Ticket) -> TicketKey:
    """What identifies a ticket."""
    return (message.epoch, message.number)


def gradient_layout(manifest: Manifest, message: pb.Gradient, *, takes_int8: bool) -> PayloadLayout:
    """The layout of the gradient that is about to come, after a check of its header.

    Args:
        manifest: the model's.
        message: the header.
        takes_int8: whether this run has local steps, whose sums alone come in int8.

    Raises:
        ManifestDigest: it was made for another model.
        BadPayload: a length that its dtype and the model do not give, or int8 where it is not taken.
        BadRequest: a number outside its limits.
        PayloadError: a dtype that is not served.
    """
    if message.manifest_digest not in manifest.digests:
        raise ManifestDigest(
            f"the gradient is for the model with digest {message.manifest_digest[:8].hex() or 'none'}…, this server "
            f"holds {manifest.digest.hex()[:16]}…: ask DescribeModel for its manifest"
        )
    if message.dtype == INT8 and not takes_int8:
        raise BadPayload(
            "payload dtype DTYPE_INT8 (5) is for the sums of local steps, which this run does not have: use "
            "DTYPE_FLOAT32 (1) or DTYPE_BFLOAT16 (2), or start the server with --local-steps"
        )
    layout = PayloadLayout.of_gradient(manifest, message.dtype, with_buffers=message.with_buffers)
    if message.payload_bytes != layout.total_bytes:
        raise BadPayload(
            f"a gradient of {message.payload_bytes} bytes was announced; dtype {message.dtype} with buffers "
            f"{message.with_buffers} makes {layout.total_bytes} bytes for this model"
        )
    if not 0 <= message.samples <= MAX_SAMPLES or not 0 <= message.compute_seconds <= MAX_COMPUTE_SECONDS:
        raise BadRequest(
            f"samples {message.samples}, compute seconds {message.compute_seconds}: expected 0 to {MAX_SAMPLES} "
            f"samples and 0 to {MAX_COMPUTE_SECONDS:g} seconds"
        )
    return layout


def check_codes(payload: Payload) -> None:
    """Refuse a gradient in int8 whose bytes are no code.

    Raises:
        BadPayload: a code or a scale is none.
    """
    fault = payload.gradient.fault if isinstance(payload.gradient, Int8Vector) else ""
    if fault:
        raise BadPayload(f"the gradient was not applied: {fault}")


def received_gradient(
    message: pb.Gradient, payload: Payload, norm: float | None, storing: Storing | None
) -> ReceivedGradient:
    """A gradient whose tensors have come."""
    loss = _loss(message.loss) if message.HasField("loss") else None
    ticket, samples = ticket_key(message.ticket), message.samples
    return ReceivedGradient(ticket, payload, samples, loss, message.compute_seconds, message.local_steps, norm, storing)


def evaluation(message: pb.Evaluation) -> Evaluation:
    """A reported evaluation.

    Raises:
        BadRequest: a number outside its limits.
    """
    accuracy = message.accuracy if message.HasField("accuracy") else None
    if message.iteration.number < 0 or not (accuracy is None or 0 <= accuracy <= 1):
        raise BadRequest(
            f"an evaluation of iteration {message.iteration.number} with accuracy {accuracy}: expected an iteration of "
            "at least 0 and a share from 0 to 1"
        )
    return Evaluation(message.iteration.epoch, message.iteration.number, _loss(message.loss), accuracy)


def _loss(reported: float) -> float:
    """One word for all that is no number, which alerts wait for: infinities would cancel out, or not, in sums."""
    return reported if math.isfinite(reported) else math.nan


def push_result(result: PushResult) -> pb.PushResult:
    """The result of a gradient, as it travels."""
    return pb.PushResult(
        request=result.request,
        iteration=pb.Iteration(epoch=result.epoch, number=result.iteration),
        delay=result.delay,
        lag_buckets=result.lag_buckets,
        learning_rate=result.step_size,
        discarded=result.discarded,
        repeated=result.repeated,
        buffers_kept=result.buffers_kept,
    )


def refused_result(request: int, refusal: OrmoError) -> pb.PushResult:
    """The result of a gradient that was refused."""
    return pb.PushResult(request=request, refusal=refusal.reason, refusal_message=str(refusal))


def write_delivery(message: pb.Delivery, delivery: Delivery, manifest: Manifest) -> None:
    """What is said about parameters of this model before they follow."""
    message.iteration.epoch, message.iteration.number = delivery.epoch, delivery.iteration
    message.samples = delivery.samples
    ticket = delivery.ticket
    if ticket is not None:
        there = message.ticket
        there.epoch, there.number, there.iteration = ticket.epoch, ticket.number, ticket.iteration
        there.bucket, there.local_steps = ticket.bucket, ticket.local_steps
    if delivery.payload is not None:
        layout = delivery.payload.layout
        message.learning_rate = delivery.learning_rate
        message.dtype, message.with_buffers = layout.dtype, layout.with_buffers
        if delivery.frozen is not None:  # which follow the payload
            layout = PayloadLayout.of(manifest, layout.dtype, with_buffers=layout.with_buffers, with_frozen=True)
        message.with_frozen, message.payload_bytes = delivery.frozen is not None, layout.total_bytes
        # Older workers and readers compare the first one with what they compute, who know nothing of merges.
        message.manifest_digest, message.model_digest = manifest.without_merges.digest, manifest.model_digest


# Frames


def require_head(frame: Frame[M], wanted: str) -> Headed[M]:
    """The frame, which must be a message with this part.

    Raises:
        BadRequest, BadManifest: it is another, or bytes that are no message.
    """
    if isinstance(frame, Malformed):
        raise not_understood(frame)
    got = "chunk" if isinstance(frame, Chunk) else frame.message.WhichOneof("part")
    if isinstance(frame, Chunk) or got != wanted:
        raise BadRequest(f"received a message with {got or 'nothing'!r} where {wanted!r} was expected")
    return frame


def check_exchange(exchange: pb.Exchange, data: memoryview) -> None:
    """Refuse an exchange that asks for nothing, or brings bytes of nothing.

    Raises:
        BadRequest: it does.
    """
    if exchange.HasField("gradient"):
        return
    if data:
        raise BadRequest(f"received {len(data)} bytes of data with an exchange that has no gradient")
    if not exchange.HasField("next"):
        # There would be no answer, and whoever waits for one would wait for ever.
        raise BadRequest(
            "received an exchange with neither a gradient nor a request for the next ticket: expected one or both"
        )


def first_of(frames: Iterator[Frame[M]], wanted: str) -> Headed[M]:
    """The first frame, as `require_head`."""
    frame = next(frames, None)
    if frame is None:
        raise BadRequest(f"the stream ended before its first message, which holds {wanted!r}")
    return require_head(frame, wanted)


def chunks_of(frames: Iterator[Frame[M]], first: memoryview = NOTHING) -> Iterator[Chunk]:
    """The chunks that come, after what came within the head; anything else is refused. None is held once taken."""
    within_head = [Chunk(0, first)] if first else []
    return chain((within_head.pop() for _ in range(len(within_head))), map(_require_chunk, frames))


def _require_chunk(frame: Frame[M]) -> Chunk:
    if isinstance(frame, Chunk):
        return frame
    if isinstance(frame, Malformed):
        raise not_understood(frame)
    got = frame.message.WhichOneof("part")
    raise BadRequest(f"received a message with {got or 'nothing'!r} where 'chunk' was expected")


def check_local_steps(worker: str, *, makes_them: bool, local_steps: int) -> None:
    """Refuse a worker that sends gradients, in a run of local steps.

    Raises:
        LocalSteps: it does.
    """
    if local_steps and not makes_them:
        raise LocalSteps(
            f"this run has local steps (--local-steps {local_steps}), and worker {worker!r} sends the gradient of each "
            "step: give it an optimizer of its own (inner=..., or --inner), which older versions do not know; or start "
            "the server without --local-steps"
        )


def check_version(version: int) -> None:
    """Refuse a worker of another version of the protocol.

    Raises:
        ProtocolVersion: it is.
    """
    if not version:
        raise ProtocolVersion(
            f"the request has no protocol_version: set it to {PROTOCOL_VERSION}, the version that this server speaks"
        )
    if version != PROTOCOL_VERSION:
        raise ProtocolVersion(
            f"the worker speaks version {version} of the protocol, this server version {PROTOCOL_VERSION}: install the "
            "same version of this package on both"
        )
