"""A proxy that ends calls at a size, as nginx does by default at 1 MiB: who reads the sentence knows what to set."""

import logging
from types import SimpleNamespace

import grpc
import pytest
from torch import nn

from ormo_worker import RemoteOptimizer
from ormo_worker.client.protocol import Step
from ormo_worker.client.retries import CallEnded
from ormo_worker.errors import Refused
from worker.fake_server import FakeServer, Fault, refuse
from worker.models import line

SENTENCE = "set nginx's client_max_body_size to 0"
CUT = ("received", refuse("INTERNAL", message="RST_STREAM"))


def passed(_: object) -> None:
    """It gets through."""


THROUGH: tuple[str, Fault] = ("received", passed)


def trained(server: FakeServer, model: nn.Module, steps: int) -> None:
    with RemoteOptimizer(model, server.address, connect_timeout=5.0) as optimizer:
        for _ in range(steps):
            optimizer.step()


def test_a_gradient_that_never_gets_through_is_not_tried_for_ever(server: FakeServer) -> None:
    server.told(CUT, CUT, CUT)
    with pytest.raises(Refused, match=r"each stream ends when it has sent about 1\.0 MiB .*" + SENTENCE):
        trained(server, nn.Linear(512, 512, bias=False), 1)
    assert not server.faults
    assert server.iteration == 0


def test_streams_that_end_again_and_again_are_told_of_once_and_training_goes_on(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.told(*[THROUGH, THROUGH, THROUGH, CUT] * 4)
    with caplog.at_level(logging.WARNING):
        trained(server, nn.Linear(256, 256, bias=False), 13)
    assert not server.faults
    assert server.iteration == 13
    assert [record.message.count(SENTENCE) for record in caplog.records if SENTENCE in record.message] == [1]


@pytest.mark.parametrize("fault", [CUT, ("received", refuse("UNAVAILABLE"))])
def test_other_streams_that_end_say_nothing_of_proxies(
    server: FakeServer, caplog: pytest.LogCaptureFixture, fault: tuple[str, Fault]
) -> None:
    server.told(*[fault] * 4)
    model = line(weight=2.0) if fault is CUT else nn.Linear(512, 512, bias=False)
    with caplog.at_level(logging.WARNING):
        trained(server, model, 1)
    assert server.iteration == 1
    assert SENTENCE not in caplog.text


def test_an_answer_of_http_that_says_too_large_is_final() -> None:
    call = SimpleNamespace(
        code=lambda: grpc.StatusCode.UNKNOWN,
        details=lambda: "Received http2 header with status: 413",
        trailing_metadata=lambda: (),
    )
    end = CallEnded.of(call)  # type: ignore[arg-type]
    assert end.step is Step.FAIL
    assert SENTENCE in str(end.error("the model"))
