"""What a slot does next: tables of events and steps."""

import pytest

from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.client.protocol import AFTER_REASON, SlotSession, Step, step_after

TICKET = pb.Ticket(epoch=1, number=5)
NEXT = pb.Ticket(epoch=1, number=6)


def with_ticket() -> SlotSession:
    """A session after its first delivery: request 1 is done, and it holds TICKET."""
    session = SlotSession()
    session.begin(with_gradient=False, wants_next=True)
    assert session.on_delivery(TICKET) is Step.DONE
    return session


def result(request: int, refusal: str = "") -> pb.PushResult:
    return pb.PushResult(request=request, refusal=refusal)


def happens(session: SlotSession, event: str) -> Step:
    """Tell the session of an event, written as in the tables below."""
    kind, _, rest = event.partition(" ")
    if kind == "result":
        request, _, refusal = rest.partition(" ")
        return session.on_result(result(int(request), refusal))
    if kind == "delivery":
        return session.on_delivery(NEXT)
    if kind == "finished":
        return session.on_finished()
    if kind == "joined":
        session.on_joined()
        return Step.SEND_AGAIN
    code, _, reason = rest.partition(" ")
    return session.on_end(code, reason)


# Each row: an event, the step that follows, and what would be sent then (P2: push as request 2; A3: ask as 3).
EXCHANGES = {
    "an exchange as it should be": [
        ("result 2", Step.READ, "P2"),
        ("delivery", Step.DONE, "P2"),
    ],
    "the connection breaks before the result: the same request again": [
        ("end UNAVAILABLE", Step.SEND_AGAIN, "P2"),
        ("end UNAVAILABLE", Step.SEND_AGAIN, "P2"),
        ("result 2", Step.READ, "P2"),
        ("delivery", Step.DONE, "P2"),
    ],
    "it breaks between result and parameters: only these are asked for": [
        ("result 2", Step.READ, "P2"),
        ("end UNAVAILABLE", Step.PULL, "A3"),
        ("end UNAVAILABLE", Step.SEND_AGAIN, "A3"),
        ("delivery", Step.DONE, "A3"),
    ],
    "the server drains, another stream took over, we cancelled: the same request again": [
        ("end UNAVAILABLE DRAINING", Step.SEND_AGAIN, "P2"),
        ("end ABORTED SUPERSEDED", Step.SEND_AGAIN, "P2"),
        ("end CANCELLED", Step.SEND_AGAIN, "P2"),
        ("end OK", Step.SEND_AGAIN, "P2"),
    ],
    "a restarted server: join, push with the void ticket, take the new one": [
        ("end FAILED_PRECONDITION NOT_A_MEMBER", Step.JOIN, "P2"),
        ("joined", Step.SEND_AGAIN, "P2"),
        ("result 2 TICKET_UNKNOWN", Step.READ, "P2"),
        ("delivery", Step.DONE, "P2"),
    ],
    "a lease that ends after the result: join, then ask": [
        ("result 2", Step.READ, "P2"),
        ("end FAILED_PRECONDITION NOT_A_MEMBER", Step.JOIN, "A3"),
        ("joined", Step.SEND_AGAIN, "A3"),
        ("delivery", Step.DONE, "A3"),
    ],
    "a gradient that is not finite is dropped, the next ticket comes at once": [
        ("result 2 NON_FINITE", Step.READ, "P2"),
        ("delivery", Step.DONE, "P2"),
    ],
    "a refused gradient is not sent twice": [
        ("result 2 NON_FINITE", Step.READ, "P2"),
        ("end UNAVAILABLE", Step.PULL, "A3"),
    ],
    "a ticket that is unknown to the call: ask for another": [
        ("end FAILED_PRECONDITION TICKET_UNKNOWN", Step.PULL, "A3"),
        ("delivery", Step.DONE, "A3"),
    ],
    "the last gradient of the run": [
        ("result 2", Step.READ, "P2"),
        ("finished", Step.FINISHED, "P2"),
    ],
    "a gradient after the end": [("result 2 FINISHED", Step.FINISHED, "P2")],
    "the end, told by a status": [("end FAILED_PRECONDITION FINISHED", Step.FINISHED, "P2")],
    "replaced": [("end FAILED_PRECONDITION REPLACED", Step.REPLACED, "P2")],
    "a payload that the server can't read": [("end INVALID_ARGUMENT BAD_PAYLOAD", Step.FAIL, "P2")],
    "a result of another request": [("result 1", Step.FAIL, "P2")],
    "two results": [("result 2", Step.READ, "P2"), ("result 2", Step.FAIL, "P2")],
    "parameters before the result": [("delivery", Step.FAIL, "P2")],
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchange_follows_its_table(name: str) -> None:
    session = with_ticket()
    session.begin(with_gradient=True, wants_next=True)
    for event, step, sends in EXCHANGES[name]:
        assert happens(session, event) is step, event
        ask = session.ask
        assert f"{'A' if ask.ticket is None else 'P'}{ask.request}" == sends, event
        assert ask.ticket in (None, TICKET)
    if step is Step.DONE:
        assert session.ticket == NEXT


def test_every_reason_has_a_step() -> None:
    assert set(AFTER_REASON) == set(Reason)


STATUSES = [
    ("UNAVAILABLE", "", Step.SEND_AGAIN),
    ("UNKNOWN", "", Step.SEND_AGAIN),
    ("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS", Step.SEND_AGAIN),
    ("RESOURCE_EXHAUSTED", "TOO_MANY_WORKERS", Step.SEND_AGAIN),
    ("UNAVAILABLE", "NOT_READY", Step.SEND_AGAIN),
    ("INTERNAL", "INTERNAL", Step.SEND_AGAIN),
    ("UNAVAILABLE", "A_WORD_OF_A_NEWER_SERVER", Step.SEND_AGAIN),
    ("INVALID_ARGUMENT", "A_WORD_OF_A_NEWER_SERVER", Step.FAIL),
    ("UNIMPLEMENTED", "", Step.FAIL),
    ("UNAUTHENTICATED", "", Step.FAIL),
    ("FAILED_PRECONDITION", "NOT_A_MEMBER", Step.JOIN),
    ("ALREADY_EXISTS", "MODEL_EXISTS", Step.JOIN),
]


@pytest.mark.parametrize(("code", "reason", "step"), STATUSES)
def test_a_status_leads_to_a_step(code: str, reason: str, step: Step) -> None:
    assert step_after(code, reason) is step


def test_request_numbers_rise_with_each_exchange() -> None:
    session = with_ticket()
    assert session.ask.request == 1
    assert session.begin(with_gradient=True, wants_next=True).request == 2
    session.on_result(result(2))
    session.on_delivery(NEXT)
    assert session.begin(with_gradient=True, wants_next=True).request == 3


def test_an_exchange_that_was_given_up_is_forgotten_by_the_next() -> None:
    session = with_ticket()
    session.begin(with_gradient=True, wants_next=True)
    session.on_result(result(2))
    assert session.begin(with_gradient=True, wants_next=True).request == 3
    assert session.result is None


def test_the_result_and_the_refusal_are_kept_for_the_caller() -> None:
    session = with_ticket()
    session.begin(with_gradient=True, wants_next=True)
    session.on_result(result(2, "TICKET_UNKNOWN"))
    session.on_delivery(NEXT)
    assert session.result is None
    assert session.refusal is not None
    session.begin(with_gradient=True, wants_next=True)
    session.on_result(result(3))
    assert session.result is not None
    assert session.refusal is None


@pytest.mark.parametrize(
    ("refusal", "left"), [("", None), ("TICKET_UNKNOWN", None), ("NON_FINITE", TICKET), ("NORM_TOO_LARGE", TICKET)]
)
def test_without_a_wish_for_the_next_ticket_the_result_is_the_end(refusal: str, left: pb.Ticket | None) -> None:
    session = with_ticket()
    session.begin(with_gradient=True, wants_next=False)
    assert session.on_result(result(2, refusal)) is Step.DONE
    assert session.ticket == left


def test_buffers_are_asked_for_once_after_each_join() -> None:
    session = SlotSession()
    assert session.begin(with_gradient=False, wants_next=True).wants_buffers
    session.on_delivery(TICKET)
    assert not session.begin(with_gradient=True, wants_next=True).wants_buffers
    session.on_joined()
    assert session.ask.wants_buffers
    session.on_result(result(2))
    session.on_delivery(NEXT)
    assert not session.begin(with_gradient=True, wants_next=True).wants_buffers


def test_frozen_tensors_are_asked_for_once_after_each_join_unless_another_slot_has_them() -> None:
    session = SlotSession()
    session.begin(with_gradient=False, wants_next=True)
    session.on_joined(wants_frozen=False)
    assert (session.ask.wants_buffers, session.ask.wants_frozen) == (True, False)
    session.on_delivery(TICKET)
    session.begin(with_gradient=True, wants_next=True)
    session.on_joined(wants_frozen=True)
    assert session.ask.wants_frozen
    session.on_end("UNAVAILABLE", "")
    assert session.ask.wants_frozen, "they have not come yet"
    session.on_result(result(2))
    session.on_delivery(NEXT)
    assert not session.begin(with_gradient=True, wants_next=True).wants_frozen


def kept(request: int) -> pb.PushResult:
    return pb.PushResult(request=request, buffers_kept=True)


def exchanged(session: SlotSession, result: pb.PushResult) -> bool:
    """Whether an exchange with this result asks for buffers."""
    ask = session.begin(with_gradient=True, wants_next=True)
    assert session.on_result(result) is Step.READ
    assert session.on_delivery(NEXT) is Step.DONE
    return ask.wants_buffers


def test_buffers_that_the_server_did_not_take_are_asked_for_with_the_next_exchange_and_only_then() -> None:
    session = with_ticket()
    assert [exchanged(session, kept(number)) for number in (2, 3)] == [False, True]
    assert not exchanged(session, result(4))  # it had them with the one before, whatever became of its own


def test_buffers_that_were_not_taken_come_with_parameters_that_are_asked_for_anew() -> None:
    session = with_ticket()
    session.begin(with_gradient=True, wants_next=True)
    session.on_result(kept(2))
    assert session.on_end("UNAVAILABLE", "") is Step.PULL
    assert session.ask.wants_buffers
    session.on_delivery(NEXT)
    assert not exchanged(session, result(4))


def test_a_gradient_needs_a_ticket_and_an_exchange_needs_a_purpose() -> None:
    session = SlotSession()
    with pytest.raises(ValueError, match="holds no ticket"):
        session.begin(with_gradient=True, wants_next=True)
    with pytest.raises(ValueError, match="must want a ticket"):
        session.begin(with_gradient=False, wants_next=False)
