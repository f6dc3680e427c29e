"""The client against a server that misbehaves: each rule of `protocol.py`, over a real connection."""

import logging
import math
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from torch import nn

from ormo_protos.manifest import FLOAT32
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.client.api import ParameterClient
from ormo_worker.client.arguments import Patience
from ormo_worker.client.messages import Gradient
from ormo_worker.client.slot import ExchangeOutcome, Slot
from ormo_worker.errors import (
    ClientClosed,
    ModelMismatch,
    OptionRefused,
    OrmoError,
    ProtocolBroken,
    Refused,
    Replaced,
    RunFinished,
    ServerUnreachable,
)
from ormo_worker.pytorch.transfer import Staging
from worker.fake_server import LOST, FakeServer, refuse

QUICK = Patience(connect_timeout=5.0, failure_timeout=5.0)
BIG = 3 << 18  # parameters, so that a payload has three chunks


class Worker:
    """A client with a model of `size` parameters, all 1 at first, and gradients that are all the same."""

    def __init__(self, server: FakeServer, size: int = 1, patience: Patience = QUICK, worker_id: str = "w") -> None:
        model = nn.Linear(size, 1, bias=False)
        nn.init.ones_(model.weight)
        self.staging = Staging(model)
        self.client = ParameterClient(
            server.address,
            self.staging.tensors.manifest,
            model=self.staging.snapshot,
            worker_id=worker_id,
            patience=patience,
        )
        self.slot: Slot = self.client.slots[0]

    def gradient(self, value: float = 1.0) -> Gradient:
        payload = self.staging.payload(FLOAT32, with_buffers=False)
        payload.parameters.fill_(value)
        return Gradient(payload, samples=4, loss=0.5, compute_seconds=0.25)

    def push(self, value: float = 1.0, *, wants_next: bool = True) -> ExchangeOutcome:
        return self.slot.exchange(self.gradient(value), wants_next=wants_next)


@pytest.fixture
def worker(server: FakeServer) -> Iterator[Worker]:
    """A worker that has joined and holds its first ticket."""
    worker = Worker(server)
    worker.client.join()
    worker.slot.exchange(None)
    server.asked.clear()
    yield worker
    worker.client.close()


def value_of(outcome: ExchangeOutcome) -> float:
    """The one value that all delivered parameters have."""
    assert outcome.delivered is not None
    (value,) = outcome.delivered.payload.parameters.unique().tolist()
    return value


# Joining.


def test_the_first_worker_hands_the_server_its_model(server: FakeServer) -> None:
    worker = Worker(server, BIG)
    welcome = worker.client.join()
    assert server.asked == ["join", "offer", "join"]
    assert (welcome.rank, welcome.data_seed) == (0, 1237)
    assert value_of(worker.slot.exchange(None)) == 1.0
    worker.client.close()
    assert server.asked[-1] == "leave"


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e308, math.inf, math.nan])
def test_a_lease_that_nobody_can_keep_is_an_error(server: FakeServer, seconds: float) -> None:
    server.lease_seconds = seconds
    with (
        Worker(server).client as client,
        pytest.raises(ProtocolBroken, match=r"grants a lease of .* s: expected above"),
    ):
        client.join()


@pytest.mark.parametrize("seconds", [1e308, math.inf, math.nan])
def test_a_server_that_asks_to_wait_for_ever_is_asked_again(
    server: FakeServer, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ormo_worker.client.retries._LONGEST_ASKED_SECONDS", 0.01)
    server.answers_to_join.append(pb.JoinResponse(wait=pb.Wait(retry_seconds=seconds)))
    with Worker(server).client as client:
        client.join()
    assert server.asked == ["join", "join", "offer", "join", "leave"]


OFFERS = [refuse("FAILED_PRECONDITION", Reason.NOT_WANTED), refuse("ALREADY_EXISTS", Reason.MODEL_EXISTS), LOST]


@pytest.mark.parametrize("fault", OFFERS)
def test_an_offer_that_fails_leads_back_to_join(server: FakeServer, fault: object) -> None:
    server.told(("offer", fault))
    with Worker(server).client as client:
        client.join()
    assert server.asked == ["join", "offer", "join", "offer", "join", "leave"]


def test_a_model_that_is_too_large_for_the_server_is_an_error(server: FakeServer) -> None:
    server.told(("offer", refuse("RESOURCE_EXHAUSTED", Reason.MEMORY_LIMIT, message="needs 9 GB, allowed are 8 GB")))
    with Worker(server).client as client, pytest.raises(Refused, match="MEMORY_LIMIT: needs 9 GB") as caught:
        client.join()
    assert caught.value.reason == Reason.MEMORY_LIMIT


def test_while_another_worker_hands_over_the_model_this_one_waits(server: FakeServer) -> None:
    server.answers_to_join.extend([pb.JoinResponse(wait=pb.Wait(retry_seconds=0.01))] * 2)
    with Worker(server).client as client:
        client.join()
    assert server.asked[:4] == ["join", "join", "join", "offer"]


def test_a_full_server_is_asked_again(server: FakeServer) -> None:
    server.told(("join", refuse("RESOURCE_EXHAUSTED", Reason.TOO_MANY_WORKERS, retry_seconds=0.3)))
    start = time.monotonic()
    with Worker(server).client as client:
        client.join()
    assert time.monotonic() - start >= 0.3


def test_another_model_is_refused_with_the_differences(server: FakeServer) -> None:
    with Worker(server, 2).client as client:
        client.join()
    with Worker(server, 3).client as client, pytest.raises(ModelMismatch) as caught:
        client.join()
    assert "'weight' is a float32 parameter of shape (1, 3) here and a float32 parameter of shape (1, 2) there" in str(
        caught.value
    )


def test_of_many_differences_the_first_three_are_shown(server: FakeServer) -> None:
    with Worker(server).client as client:
        client.join()
    other = Staging(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))).tensors.manifest
    with ParameterClient(server.address, other, patience=QUICK) as client, pytest.raises(ModelMismatch) as caught:
        client.join()
    assert "and 2 more): start this worker with the server's task" in str(caught.value)


def test_a_client_without_a_model_says_so_when_asked_for_one(server: FakeServer) -> None:
    manifest = Worker(server).staging.tensors.manifest
    with (
        ParameterClient(server.address, manifest, patience=QUICK) as client,
        pytest.raises(OrmoError, match="it has none: start"),
    ):
        client.join()


def test_a_run_that_is_over_is_not_joined(server: FakeServer) -> None:
    server.told(("join", refuse("FAILED_PRECONDITION", Reason.FINISHED)))
    with Worker(server).client as client, pytest.raises(RunFinished):
        client.join()


def test_a_server_of_another_protocol_is_an_error(server: FakeServer) -> None:
    server.told(("join", refuse("FAILED_PRECONDITION", Reason.PROTOCOL_VERSION, message="this is version 2")))
    with Worker(server).client as client, pytest.raises(Refused, match="this is version 2"):
        client.join()


@pytest.mark.parametrize("worker_id", ["", "two words", "ü", "x" * 129])
def test_a_bad_worker_id_is_an_error(server: FakeServer, worker_id: str) -> None:
    with pytest.raises(OptionRefused, match="expected 1 to 128 of the characters"):
        Worker(server, worker_id=worker_id)


def test_workers_get_ids_of_their_own(server: FakeServer) -> None:
    manifest = Worker(server).staging.tensors.manifest
    ids = {ParameterClient(server.address, manifest).identity.worker for _ in range(2)}
    assert len(ids) == 2


# First contact.


def test_nobody_at_the_address_is_one_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = FakeServer(port=free.getsockname()[1])
    client = Worker(nowhere, patience=Patience(connect_timeout=0.3)).client
    with client, pytest.raises(ServerUnreachable) as caught:
        client.join()
    sentence = str(caught.value)
    assert sentence.startswith(f"no parameter server answered at {nowhere.address} within 0.3 seconds (UNAVAILABLE: ")
    assert ": start ormo-server there, or correct the address; if it asks for certificates" in sentence


def test_a_host_that_accepts_and_says_nothing_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        nobody = FakeServer(port=mute.getsockname()[1])
        client = Worker(nobody, patience=Patience(connect_timeout=0.3)).client
        with client, pytest.raises(ServerUnreachable, match=r"within 0\.3 seconds"):
            client.join()


def test_a_server_that_starts_later_is_found() -> None:
    late = FakeServer()
    late.start().stop()  # takes a port
    worker = Worker(late)
    starter = threading.Timer(0.3, late.start)
    starter.start()
    worker.client.join()
    worker.client.close()
    starter.join()
    late.stop()


def test_a_server_that_is_starting_counts_as_found(server: FakeServer) -> None:
    not_ready = refuse("UNAVAILABLE", Reason.NOT_READY, retry_seconds=0.1)
    server.told(*[("join", not_ready)] * 5)
    with Worker(server, patience=Patience(connect_timeout=0.2)).client as client:
        client.join()


# Exchanges.


def test_an_exchange_gives_result_and_parameters(server: FakeServer, worker: Worker) -> None:
    outcome = worker.push()
    assert outcome.result is not None
    assert (outcome.result.iteration.number, outcome.refusal, outcome.finished) == (1, None, False)
    assert value_of(outcome) == 0.5
    (announced,) = server.announced
    assert (announced.samples, announced.loss, announced.compute_seconds) == (4, 0.5, 0.25)
    assert server.asked == ["push 2"]


def test_many_exchanges_go_over_one_stream_and_into_one_payload(server: FakeServer, worker: Worker) -> None:
    payloads = {id(worker.push().delivered.payload) for _ in range(5)}  # type: ignore[union-attr]
    assert len(payloads) == 1
    assert server.asked == [f"push {request}" for request in range(2, 7)]


def test_the_last_exchange_can_do_without_a_ticket(server: FakeServer, worker: Worker) -> None:
    outcome = worker.push(wants_next=False)
    assert outcome.result is not None
    assert outcome.delivered is None
    assert not worker.slot.holds_ticket
    assert value_of(worker.slot.exchange(None)) == 0.5


def test_large_payloads_travel_in_chunks_both_ways(server: FakeServer) -> None:
    worker = Worker(server, BIG)
    worker.client.join()
    worker.slot.exchange(None)
    assert value_of(worker.push()) == 0.5
    assert server.gradients[0].shape == (BIG,)
    worker.client.close()


NOT_A_MEMBER = refuse("FAILED_PRECONDITION", Reason.NOT_A_MEMBER)
# What goes wrong at a push, and what the server is asked for then.
TROUBLE = {
    "the connection breaks before the gradient": ("exchange", LOST, ["push 2", "push 2"]),
    "it breaks after the gradient": ("received", LOST, ["push 2", "push 2"]),
    "it breaks after the update": ("result", LOST, ["push 2", "push 2"]),
    "it breaks between result and parameters": ("delivery", LOST, ["push 2", "ask 3"]),
    "the server drains": ("exchange", refuse("UNAVAILABLE", Reason.DRAINING), ["push 2", "push 2"]),
    "it has too many streams": (
        "exchange",
        refuse("RESOURCE_EXHAUSTED", Reason.TOO_MANY_STREAMS, retry_seconds=0.05),
        ["push 2", "push 2"],
    ),
    "another stream took over": ("exchange", refuse("ABORTED", Reason.SUPERSEDED), ["push 2", "push 2"]),
    "a proxy gives up": ("exchange", refuse("UNKNOWN"), ["push 2", "push 2"]),
    "a bug": ("exchange", refuse("INTERNAL", Reason.INTERNAL), ["push 2", "push 2"]),
    "the lease is out": ("exchange", NOT_A_MEMBER, ["push 2", "join", "push 2"]),
    "the lease is out after the result": ("delivery", NOT_A_MEMBER, ["push 2", "join", "ask 3"]),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_mended_and_the_gradient_counted_once(server: FakeServer, worker: Worker, name: str) -> None:
    point, fault, asked = TROUBLE[name]
    server.told((point, fault))
    outcome = worker.push()
    assert server.asked == asked
    assert outcome.result is not None
    assert value_of(outcome) == 0.5
    assert server.iteration == 1
    assert value_of(worker.push()) == 0.0


def test_a_result_that_was_lost_is_repeated(server: FakeServer, worker: Worker) -> None:
    server.told(("result", LOST))
    outcome = worker.push()
    assert outcome.result is not None
    assert outcome.result.repeated


def test_after_a_stream_breaks_between_exchanges_the_next_one_opens_another(server: FakeServer, worker: Worker) -> None:
    server.stop()
    server.start()
    assert value_of(worker.push()) == 0.5


def test_an_unknown_ticket_loses_the_gradient_and_nothing_else(server: FakeServer, worker: Worker) -> None:
    server.slots.clear()
    outcome = worker.push()
    assert outcome.result is None
    assert outcome.refusal is not None
    assert outcome.refusal.refusal == Reason.TICKET_UNKNOWN
    assert value_of(outcome) == 1.0
    assert value_of(worker.push()) == 0.5


def test_a_gradient_that_is_not_finite_is_lost_and_the_next_one_counts(server: FakeServer, worker: Worker) -> None:
    outcome = worker.push(float("nan"))
    assert outcome.refusal is not None
    assert outcome.refusal.refusal == Reason.NON_FINITE
    assert value_of(worker.push()) == 0.5
    assert server.asked == ["push 2", "push 3"]


def test_a_server_that_restarts_and_forgets_the_workers_is_joined_again(server: FakeServer, worker: Worker) -> None:
    server.stop()
    server.forget_workers()
    server.epoch = 8
    restart = threading.Timer(0.3, server.start)
    restart.start()
    outcome = worker.push()
    restart.join()
    assert server.asked == ["join", "push 2"] or server.asked == ["push 2", "join", "push 2"]
    assert outcome.refusal is not None
    assert outcome.refusal.refusal == Reason.TICKET_UNKNOWN
    assert outcome.delivered is not None
    assert outcome.delivered.iteration.epoch == 8
    assert value_of(worker.push()) == 0.5


def test_a_server_that_lost_its_model_is_offered_the_current_one(server: FakeServer, worker: Worker) -> None:
    server.forget_workers()
    server.manifest = server.model = None
    assert worker.push().result is None
    assert server.asked == ["push 2", "join", "offer", "join", "push 2"]
    assert value_of(worker.push()) == 0.5


def test_a_server_that_came_back_with_another_model_is_an_error(server: FakeServer, worker: Worker) -> None:
    server.forget_workers()
    server.manifest = Worker(server, 2).staging.tensors.manifest
    with pytest.raises(ModelMismatch):
        worker.push()


def test_the_last_gradient_of_the_run_ends_it(server: FakeServer, worker: Worker) -> None:
    server.stop_after = 1
    outcome = worker.push()
    assert outcome.result is not None
    assert outcome.delivered is None
    assert outcome.finished


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_gradient_after_the_end_is_told_that_the_run_is_over(
    server: FakeServer, worker: Worker, forgotten: bool
) -> None:
    server.stop_after, server.iteration = 1, 1
    if forgotten:
        server.forget_workers()
    outcome = worker.push()
    assert (outcome.result, outcome.delivered, outcome.finished) == (None, None, True)


ERRORS = [
    (refuse("FAILED_PRECONDITION", Reason.REPLACED), Replaced, "a newer process has joined with this worker's id"),
    (refuse("INVALID_ARGUMENT", Reason.BAD_PAYLOAD), Refused, "BAD_PAYLOAD: as scripted"),
    (refuse("INVALID_ARGUMENT", Reason.MANIFEST_DIGEST), Refused, "MANIFEST_DIGEST: as scripted"),
    (refuse("UNIMPLEMENTED"), Refused, "what listens there is not an ormo-server"),
]


@pytest.mark.parametrize(("fault", "error", "sentence"), ERRORS)
def test_what_waiting_cannot_mend_is_an_error(
    server: FakeServer, worker: Worker, fault: object, error: type[Exception], sentence: str
) -> None:
    server.told(("exchange", fault))
    with pytest.raises(error, match=sentence):
        worker.push()


def test_after_an_error_the_slot_can_be_used_again(server: FakeServer, worker: Worker) -> None:
    server.told(("received", refuse("INVALID_ARGUMENT", Reason.BAD_PAYLOAD)))
    with pytest.raises(Refused):
        worker.push()
    assert value_of(worker.push()) == 0.5


def test_an_answer_against_the_protocol_is_an_error(server: FakeServer, worker: Worker) -> None:
    server._result = lambda *_: pb.PushResult(request=99)  # type: ignore[method-assign]
    with pytest.raises(ProtocolBroken, match="request 2 of slot 0"):
        worker.push()


def test_after_first_contact_it_gives_up_only_if_told_to(caplog: pytest.LogCaptureFixture, server: FakeServer) -> None:
    worker = Worker(server, patience=Patience(5.0, 5.0, give_up_after=0.3))
    worker.client.join()
    worker.slot.exchange(None)
    server.stop()
    with caplog.at_level(logging.WARNING), pytest.raises(ServerUnreachable, match=r"kept failing for 0\.3 seconds"):
        worker.push()
    assert len(caplog.records) == 1  # many attempts, one warning
    worker.client.close()
    server.start()


# Heartbeats and silence.


def test_heartbeats_keep_a_worker_that_computes_and_notice_the_end(server: FakeServer) -> None:
    server.lease_seconds = 0.03
    worker = Worker(server)
    worker.client.join()
    worker.slot.exchange(None)
    server.stop_after, server.iteration = 1, 1
    eventually(lambda: worker.client.finished)
    server.asked.clear()
    assert worker.push().finished
    assert server.asked == []  # the gradient was not even sent
    worker.client.close()


def test_a_lost_lease_is_noticed_while_an_exchange_waits(server: FakeServer) -> None:
    server.lease_seconds = 0.03
    worker = Worker(server)
    worker.client.join()
    worker.slot.exchange(None)
    released = threading.Event()
    server.told(("result", lambda context: (server.forget_workers(), released.wait(5.0))))
    outcome = worker.push()  # a new stream gets through while the old one still hangs
    released.set()
    assert outcome.refusal is not None
    assert outcome.delivered is not None
    worker.client.close()


def test_a_silent_server_is_asked_again_on_a_new_stream(server: FakeServer) -> None:
    server.lease_seconds = 0.03
    worker = Worker(server)
    worker.client.join()
    worker.slot.exchange(None)
    released = threading.Event()
    hang = ("heartbeat", lambda context: released.wait(0.2))
    server.told(("received", lambda context: (server.told(hang, hang, hang), released.wait(5.0))))
    outcome = worker.push()
    released.set()
    assert outcome.result is not None
    assert server.asked.count("push 2") >= 2
    assert server.iteration == 1
    worker.client.close()


def test_a_replaced_worker_is_told_by_its_heartbeat(server: FakeServer) -> None:
    server.lease_seconds = 0.03
    worker = Worker(server)
    worker.client.join()
    worker.slot.exchange(None)
    released = threading.Event()
    replaced = ("heartbeat", refuse("FAILED_PRECONDITION", Reason.REPLACED))
    server.told(("received", lambda context: (server.told(replaced), released.wait(5.0))))
    with pytest.raises(Replaced):
        worker.push()
    released.set()
    worker.client.close()


# Readers.


def test_a_reader_pulls_without_joining_and_only_what_is_newer(server: FakeServer) -> None:
    worker = Worker(server, BIG)
    worker.client.join()
    with Worker(server, BIG).client as reader:
        first = reader.pull()
        assert first is not None
        assert (first.ticket, first.iteration.number) == (None, 0)
        assert first.payload.parameters.unique().tolist() == [1.0]
        assert reader.pull(newer_than=first.iteration) is None
        server.epoch = 99
        assert reader.pull(newer_than=first.iteration) is not None
        assert len(server.members) == 1
    worker.client.close()


@pytest.mark.parametrize("point", ["pull", "pull chunk"])
def test_a_pull_that_breaks_is_made_again(server: FakeServer, worker: Worker, point: str) -> None:
    server.told((point, LOST))
    assert worker.client.pull() is not None
    assert server.asked == ["pull", "pull"]


def test_a_pull_that_falls_silent_is_made_again(server: FakeServer) -> None:
    with Worker(server, patience=Patience(5.0, failure_timeout=1.0)).client as client:
        client.join()
        released = threading.Event()
        server.told(("pull", lambda context: released.wait(10.0)))
        client._membership.stop()  # or its heartbeats would be the sign of life
        assert client.pull() is not None
        released.set()


def test_a_pull_may_be_limited_in_time(server: FakeServer, worker: Worker) -> None:
    server.told(*[("pull", refuse("UNAVAILABLE", Reason.DRAINING))] * 100)
    with pytest.raises(ServerUnreachable, match="DRAINING"):
        worker.client.pull(within=0.1)


def test_a_reader_of_another_model_gets_an_error(server: FakeServer, worker: Worker) -> None:
    with Worker(server, 9).client as reader, pytest.raises(ModelMismatch, match="give the server and this program"):
        reader.pull()


def test_the_status_is_to_be_had_without_joining(server: FakeServer) -> None:
    with Worker(server).client as client:
        assert client.status().phase == pb.GetStatusResponse.PHASE_TRAINING


# The end.


def test_closing_wakes_an_exchange_that_waits(server: FakeServer) -> None:
    worker = Worker(server)
    worker.client.join()
    worker.slot.exchange(None)
    released = threading.Event()
    server.told(("received", lambda context: (closer.start(), released.wait(5.0))))
    closer = threading.Timer(0.0, worker.client.close)
    with pytest.raises(ClientClosed):
        worker.push()
    released.set()
    closer.join()


def test_closing_twice_and_using_a_closed_client_is_harmless(server: FakeServer, worker: Worker) -> None:
    worker.client.close()
    worker.client.close()
    with pytest.raises(ClientClosed):
        worker.push()
    assert server.asked == ["leave"]


def test_closing_while_the_server_is_away_does_not_wait_for_it(server: FakeServer) -> None:
    worker = Worker(server)
    worker.client.join()
    server.stop()
    start = time.monotonic()
    worker.client.close()
    assert time.monotonic() - start < 2.5
    server.start()


def test_several_slots_share_a_membership(server: FakeServer) -> None:
    staging = Worker(server).staging
    manifest = staging.tensors.manifest
    client = ParameterClient(server.address, manifest, model=staging.snapshot, slots=2, patience=QUICK)
    threads = [threading.Thread(target=slot.exchange, args=(None,)) for slot in client.slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked.count("join") == 2  # one of them for the offer
    assert [slot.holds_ticket for slot in client.slots] == [True, True]
    client.close()


def eventually(condition: object) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)
