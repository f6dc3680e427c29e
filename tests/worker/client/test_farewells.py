"""What a worker says when calls end: a server that stops in order is no reason to warn, and one that vanishes is."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from ormo_protos.manifest import FLOAT32
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_worker.client import retries
from ormo_worker.client.api import ParameterClient
from ormo_worker.client.arguments import Observer, Patience
from ormo_worker.client.messages import Gradient
from ormo_worker.client.retries import CallEnded, RetryLoop, SignsOfLife, TryAgain, as_call_ended
from ormo_worker.pytorch.transfer import Staging
from service.wire import eventually
from worker.fake_server import LOST, FakeServer, Fault, refuse
from worker.models import line

DRAINING = ("received", refuse("UNAVAILABLE", Reason.DRAINING))
AWAY = 3


class Restarts(Observer):
    """Starts the server again when it could not be reached a few times."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.causes: list[str] = []

    def note_retry(self, cause: str) -> None:
        self.causes.append(cause)
        if self.causes.count("UNAVAILABLE") == AWAY and cause == "UNAVAILABLE":
            self.server.start()


class Pushes:
    """A worker that has joined; each call pushes a gradient."""

    def __init__(self, client: ParameterClient, staging: Staging) -> None:
        self._client, self._staging = client, staging
        client.join()
        client.slots[0].exchange(None)

    @property
    def stream_has_ended(self) -> bool:
        stream = self._client.slots[0]._stream
        return stream is None or not stream._call.is_active()

    def __call__(self) -> None:
        payload = self._staging.payload(FLOAT32, with_buffers=False)
        payload.parameters.fill_(1.0)
        self._client.slots[0].exchange(Gradient(payload, samples=1))


@contextmanager
def joined(server: FakeServer, observer: Observer | None = None) -> Iterator[Pushes]:
    staging = Staging(line(weight=1.0))
    manifest, model = staging.tensors.manifest, staging.snapshot
    patience = Patience(connect_timeout=5.0, failure_timeout=5.0)
    with ParameterClient(
        server.address, manifest, model=model, worker_id="w", patience=patience, observer=observer
    ) as client:
        yield Pushes(client, staging)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and beginning of what is told of calls."""
    words = {"ends calls in order": "ends", " failed (": "failed", " succeeded after ": "succeeded"}
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    return [(level, short) for level, text in lines for word, short in words.items() if word in text]


ENDS, FAILED, SUCCEEDED = ("INFO", "ends"), ("WARNING", "failed"), ("INFO", "succeeded")


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ([DRAINING], [ENDS, SUCCEEDED]),
        ([("received", LOST)], [FAILED, SUCCEEDED]),
        ([DRAINING, ("received", LOST), ("received", refuse("UNAVAILABLE", Reason.NOT_READY))], [ENDS, SUCCEEDED]),
        ([DRAINING, ("received", refuse("RESOURCE_EXHAUSTED", Reason.DISK_FULL))], [ENDS, FAILED, SUCCEEDED]),
    ],
    ids=["it drains", "it vanishes", "it drains, is away, and starts", "it drains, and then has another trouble"],
)
def test_only_what_a_server_did_not_announce_is_a_warning(
    server: FakeServer, caplog: pytest.LogCaptureFixture, faults: list[tuple[str, Fault]], told: list[tuple[str, str]]
) -> None:
    caplog.set_level(logging.INFO)
    with joined(server) as push:
        server.told(*faults)
        push()
    assert said(caplog) == told


def test_a_stream_that_the_server_ends_between_exchanges_announces_its_stop(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    contexts: list[grpc.ServicerContext] = []
    restarts = Restarts(server)
    with joined(server, restarts) as push:
        server.told(("exchange", contexts.append))
        push()
        contexts[0].cancel()
        eventually(lambda: push.stream_has_ended)  # before the connection does, which says less
        server.stop()
        push()
    ended, *away = restarts.causes
    assert ended == "CANCELLED"
    assert len(away) >= AWAY  # and as many as it takes to be back
    assert set(away) == {"UNAVAILABLE"}
    assert said(caplog) == [ENDS, SUCCEEDED]


def test_a_server_that_vanishes_after_it_came_back_is_a_warning_again(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with joined(server) as push:
        server.told(DRAINING)
        push()
        server.told(("received", LOST))
        push()
    assert said(caplog) == [ENDS, SUCCEEDED, FAILED, SUCCEEDED]


def test_a_server_that_stays_away_for_longer_than_a_restart_is_a_warning(
    server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_SECONDS_OF_A_RESTART", 0.0)
    with joined(server) as push:
        server.told(DRAINING, ("received", LOST))
        push()
    assert said(caplog) == [FAILED]


def wait_for_the_end(context: grpc.ServicerContext) -> None:
    eventually(lambda: not context.is_active())


def end_there(context: grpc.ServicerContext) -> None:
    context.cancel()
    wait_for_the_end(context)  # else the answer may be away first


def test_a_call_that_was_cancelled_here_is_no_announcement(server: FakeServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        server.told(("status", end_there))
        with pytest.raises(grpc.RpcError) as ended:
            ParameterServerStub(channel).GetStatus(pb.GetStatusRequest())
        there = as_call_ended(ended.value)
        # In this order: a call cancelled here may come to the server all the same, and would get the other's end.
        server.told(("status", wait_for_the_end))
        call = ParameterServerStub(channel).GetStatus.future(pb.GetStatusRequest())
        call.cancel()
        here = CallEnded.of(call)
    assert (here.code, here.is_farewell) == ("CANCELLED", False)
    assert (there.code, there.is_farewell) == ("CANCELLED", True)


@pytest.mark.parametrize(
    ("look", "warnings"), [(2, 0), (3, 1)], ids=["when the call has ended", "while it waits for another attempt"]
)
def test_who_is_told_to_leave_neither_warns_of_a_call_that_ended_for_it_nor_waits_as_long_as_a_server_asks(
    caplog: pytest.LogCaptureFixture, look: int, warnings: int
) -> None:
    looks = iter(range(1, look + 1))

    def leaves_at_that_look() -> None:
        if next(looks) == look:
            raise KeyboardInterrupt

    def attempt() -> None:
        raise TryAgain("as the server asks", 3600.0, "CANCELLED")

    loop = RetryLoop("there", Patience(), SignsOfLife(), threading.Event(), leaves_at_that_look, Observer())
    with pytest.raises(KeyboardInterrupt):
        loop.run(attempt, "trying")
    assert len(caplog.records) == warnings
