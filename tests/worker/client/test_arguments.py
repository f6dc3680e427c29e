"""What callers may give: numbers of any kind, if they are some, and a sentence at once for all else."""

import inspect
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ormo_protos.manifest import FLOAT32
from ormo_protos.tensors import Payload
from ormo_runtime.tls import Credentials
from ormo_worker import ParameterClient, Patience, RemoteOptimizer
from ormo_worker.client.messages import Gradient, Outgoing
from ormo_worker.errors import OptionRefused, ServerUnreachable
from ormo_worker.pytorch.options import OPTIONS_OF_TORCH
from ormo_worker.pytorch.transfer import Staging
from worker.fake_server import LEARNING_RATE, FakeServer
from worker.models import line

NOBODY = "127.0.0.1:1"


def backward(model: nn.Linear) -> None:
    model.zero_grad()
    model(torch.ones(1, 1)).sum().backward()


WHOLE = [
    (32, 32),
    (32.0, 32),
    (0, 0),
    (np.int64(32), 32),
    (np.float32(32), 32),
    (np.array([32.0]), 32),
    (torch.tensor(32), 32),
    (torch.tensor([1.0, 1.0, 0.0]).sum(), 2),
    (torch.tensor([7], dtype=torch.bfloat16), 7),
    (2**31 - 1, 2**31 - 1),
]
NOT_WHOLE = [
    32.5,
    -1,
    -1.0,
    2**31,
    10**400,
    1e300,
    math.nan,
    math.inf,
    np.float64("nan"),
    torch.tensor(math.inf),
    torch.tensor([1.0, 2.0]),
    torch.tensor([]),
    np.array([1, 2]),
    "32",
    b"32",
    True,
    np.True_,
    [32],
    3 + 0j,
    object(),
]


@pytest.mark.parametrize("in_flight", [1, 2])
def test_samples_are_any_number_that_is_whole(server: FakeServer, in_flight: int) -> None:
    model = line(weight=2.0)
    with RemoteOptimizer(model, server.address, connect_timeout=5.0, in_flight=in_flight) as optimizer:
        for given, _ in WHOLE:
            backward(model)
            optimizer.step(samples=given)
    # Two slots' gradients arrive in any order.
    assert sorted(announced.samples for announced in server.announced) == sorted(counted for _, counted in WHOLE)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_samples_that_are_none_are_refused_at_once_and_the_next_step_goes_on(
    server: FakeServer, in_flight: int
) -> None:
    model = line(weight=2.0)
    with RemoteOptimizer(model, server.address, connect_timeout=5.0, in_flight=in_flight) as optimizer:
        backward(model)
        for given in NOT_WHOLE:
            with pytest.raises(OptionRefused, match=r"samples is .*: expected a whole number from 0 to 2147483647"):
                optimizer.step(samples=given)  # type: ignore[arg-type]
        assert optimizer.iteration == 0
        optimizer.step(samples=1)
    assert [announced.samples for announced in server.announced] == [1]


LOSSES = [
    (0.5, 0.5),
    (2, 2.0),
    (np.float32(0.5), 0.5),
    (Fraction(1, 4), 0.25),
    (torch.tensor(0.5, requires_grad=True), 0.5),
    (torch.tensor([[0.5]], dtype=torch.float64), 0.5),
    (torch.tensor(3), 3.0),
    (math.inf, math.inf),
    (-1e308, -1e308),
]
NOT_LOSSES = [
    torch.ones(2),
    torch.tensor([]),
    torch.tensor(1j),
    torch.empty((), device="meta"),
    np.ones(2),
    "0.5",
    1j,
    10**400,
    (0.5, "logits"),
]


def test_a_loss_is_one_real_number(server: FakeServer) -> None:
    model = line(weight=2.0)
    with RemoteOptimizer(model, server.address, connect_timeout=5.0) as optimizer:
        for given, _ in LOSSES:
            backward(model)
            optimizer.step(loss=given)
        optimizer.step(loss=math.nan)
        for wrong in NOT_LOSSES:
            with pytest.raises(OptionRefused, match=r"loss is .*: expected one real number"):
                optimizer.step(loss=wrong)  # type: ignore[arg-type]
    *told, nan = [announced.loss for announced in server.announced]
    assert told == [shown for _, shown in LOSSES]
    assert math.isnan(nan)


def test_a_closure_may_return_anything_and_what_is_one_number_is_shown_as_the_loss(server: FakeServer) -> None:
    model = line(weight=2.0)
    with RemoteOptimizer(model, server.address, connect_timeout=5.0) as optimizer:
        for returned in [None, *NOT_LOSSES, *(given for given, _ in LOSSES)]:

            def closure(returned: Any = returned) -> Any:
                backward(model)
                return returned

            assert optimizer.step(closure) is returned
    silent, told = server.announced[: 1 + len(NOT_LOSSES)], server.announced[1 + len(NOT_LOSSES) :]
    assert not any(announced.HasField("loss") for announced in silent)
    assert [announced.loss for announced in told] == [shown for _, shown in LOSSES]
    assert model.weight.item() == 2.0 - LEARNING_RATE * len(server.announced)


def test_a_loss_that_is_given_goes_before_what_the_closure_returns(server: FakeServer) -> None:
    model = line(weight=2.0)
    with RemoteOptimizer(model, server.address, connect_timeout=5.0) as optimizer:
        assert optimizer.step(lambda: backward(model) or 7.0, loss=0.5) == 7.0
    assert server.announced[0].loss == 0.5


@pytest.mark.parametrize(
    ("details", "sentence"),
    [
        ({"samples": 1.5}, "samples is 1.5: expected a whole number from 0 to 2147483647"),
        ({"samples": 1, "loss": "low"}, "loss is 'low': expected one real number"),
        ({"samples": 1, "compute_seconds": math.nan}, "compute_seconds is nan: expected 0 to 1e"),
        ({"samples": 1, "compute_seconds": -0.5}, "compute_seconds is -0.5: expected 0 to 1e"),
        ({"samples": 1, "compute_seconds": None}, "compute_seconds is None: expected one real number"),
    ],
)
def test_a_gradient_for_a_slot_is_checked_when_it_is_made(details: dict[str, Any], sentence: str) -> None:
    payload = Staging(line()).payload(FLOAT32, with_buffers=False)
    with pytest.raises(OptionRefused, match=sentence):
        Gradient(payload, **details)


def test_a_gradient_has_plain_numbers_whatever_it_was_made_of() -> None:
    payload = Staging(line()).payload(FLOAT32, with_buffers=False)
    made = Gradient(payload, torch.tensor(4.0), np.float32(0.5), torch.tensor(0.25))  # type: ignore[arg-type]
    assert (made.samples, made.loss, made.compute_seconds) == (4, 0.5, 0.25)
    assert [type(number) for number in (made.samples, made.loss, made.compute_seconds)] == [int, float, float]


def _no_room(*_: object) -> Iterator[Any]:
    raise MemoryError("no room for a chunk")
    yield


def test_what_keeps_a_gradient_from_being_sent_is_raised_in_the_step(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread of gRPC's it would look like a connection that broke, and be tried again for ever."""
    model = line(weight=2.0)
    with RemoteOptimizer(model, server.address, connect_timeout=5.0) as optimizer:
        backward(model)
        with monkeypatch.context() as patch:
            patch.setattr(Payload, "chunks", _no_room)
            with pytest.raises(MemoryError, match="no room for a chunk"):
                optimizer.step()
        optimizer.step()
    assert len(server.gradients) == 1


def test_what_keeps_a_model_from_being_offered_is_raised_where_the_worker_joins(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Payload, "chunks", _no_room)
    with pytest.raises(MemoryError, match="no room for a chunk"):
        RemoteOptimizer(line(), server.address, connect_timeout=5.0)


def test_requests_end_where_one_fails_and_the_failure_is_kept() -> None:
    def two() -> Any:
        yield 1
        raise ValueError("the second")

    outgoing = Outgoing(two())
    outgoing.check()
    assert list(outgoing) == [1]
    with pytest.raises(ValueError, match="the second"):
        outgoing.check()


NO_ADDRESSES = ["", "127.0.0.1", "http://127.0.0.1:50051", "localhost:99999", "localhost:0", "[::1]", "a/b:1", "h:٣", 5]


@pytest.mark.parametrize("wrong", NO_ADDRESSES)
def test_an_address_that_is_none_is_refused_before_anything_is_dialled(wrong: Any) -> None:
    sentence = "server is .*: expected HOST:PORT"
    with pytest.raises(OptionRefused, match=sentence):
        RemoteOptimizer(line(), wrong)
    with pytest.raises(OptionRefused, match=sentence):
        ParameterClient(wrong, Staging(line()).tensors.manifest)


@pytest.mark.parametrize("right", ["127.0.0.1:1", "localhost:1", "[::1]:1"])
def test_an_address_is_dialled(right: str) -> None:
    with pytest.raises(ServerUnreachable):
        RemoteOptimizer(line(), right, connect_timeout=0.1)


def test_who_writes_it_as_another_optimizer_hears_what_it_wants_instead() -> None:
    parameters: Any = line().parameters()
    with pytest.raises(OptionRefused, match=r"the model is a generator: expected the torch.nn.Module itself, as in"):
        RemoteOptimizer(parameters, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(OptionRefused, match="the model is a str: expected"):
        RemoteOptimizer("127.0.0.1:50051", line())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("lr", "server's, the same for all workers: start ormo-server with --learning-rate and --schedule"),
        ("momentum", "server's, the same for all workers: start ormo-server with --momentum"),
        ("weight_decay", "server's, .*: start ormo-server with --weight-decay, which a group may scale"),
        ("betas", "server's, .*ormo-server's --method"),
        ("nesterov", "server's, .*ormo-server's --method"),
        ("maximize", "there is no option 'maximize': give the loss the other sign"),
        ("foreach", "there is no option 'foreach': the server updates the parameters, so leave it out"),
        ("fused", "there is no option 'fused'"),
    ],
)
def test_an_option_of_another_optimizer_gets_a_sentence_in_a_group_and_beside_the_model(
    server: FakeServer, option: str, sentence: str
) -> None:
    model = line()
    options: Any = {option: 0.5}
    with pytest.raises(OptionRefused, match=sentence):
        RemoteOptimizer(model, server.address, **options)
    with pytest.raises(OptionRefused, match=sentence):
        RemoteOptimizer(model, server.address, params=[{"params": list(model.parameters()), **options}])


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_every_option_of_torchs_optimizers_is_known(other: type[torch.optim.Optimizer]) -> None:
    assert inspect.signature(other).parameters.keys() - {"params"} <= OPTIONS_OF_TORCH


def test_what_no_optimizer_knows_is_an_unexpected_argument() -> None:
    options: Any = {"batchsize": 3}
    with pytest.raises(TypeError, match=r"RemoteOptimizer\(\) got an unexpected keyword argument 'batchsize'"):
        RemoteOptimizer(line(), NOBODY, **options)


@pytest.mark.parametrize(
    ("option", "wrong", "sentence"),
    [
        ("batch_size", 0, "batch_size is 0: expected a whole number from 1 to 2147483647"),
        ("batch_size", 2.5, "batch_size is 2.5: expected a whole number"),
        ("in_flight", 17, "in_flight is 17: expected a whole number from 1 to 16"),
        ("in_flight", "2", "in_flight is '2': expected a whole number from 1 to 16"),
        ("connect_timeout", math.nan, "connect_timeout is nan: expected seconds, above 0 and up to 1e"),
        ("connect_timeout", None, "connect_timeout is None: expected seconds"),
        ("failure_timeout", -1, "failure_timeout is -1: expected seconds, above 0 and up to 1e"),
        ("failure_timeout", math.inf, "failure_timeout is inf: expected seconds"),
        ("give_up_after", 0, "give_up_after is 0: expected seconds"),
        ("give_up_after", "soon", "give_up_after is 'soon': expected seconds"),
        ("worker_id", 5, "the worker id 5 can't be used"),
        ("metrics_listen", "9465", "metrics_listen is '9465': expected HOST:PORT"),
        ("metrics_listen", 9465, "metrics_listen is 9465: expected HOST:PORT as a str, not int"),
        ("wire_dtype", "bfloat16", "wire_dtype is bfloat16: expected torch.float32 or torch.bfloat16"),
    ],
)
def test_an_argument_of_no_use_is_refused_at_once(option: str, wrong: Any, sentence: str) -> None:
    arguments: Any = {option: wrong}
    with pytest.raises(OptionRefused, match=sentence):
        RemoteOptimizer(line(), NOBODY, **arguments)


def test_counts_and_times_may_be_numpys_or_a_tensors(server: FakeServer) -> None:
    model = line(weight=2.0)
    numbers: Any = {"batch_size": np.float64(4), "in_flight": torch.tensor(2), "connect_timeout": torch.tensor(5.0)}
    with RemoteOptimizer(model, server.address, give_up_after=np.float32(9), **numbers) as optimizer:
        backward(model)
        optimizer.step()
    assert server.announced[0].samples == 4


def test_a_reader_s_slots_and_times_are_checked(server: FakeServer) -> None:
    manifest = Staging(line()).tensors.manifest
    with pytest.raises(OptionRefused, match="slots is 0: expected a whole number from 1 to 16"):
        ParameterClient(server.address, manifest, slots=0)
    with (
        ParameterClient(NOBODY, manifest, patience=Patience(connect_timeout=5.0)) as client,
        pytest.raises(OptionRefused, match="within is nan: expected seconds"),
    ):
        client.pull(within=math.nan)


def test_files_of_credentials_may_be_named_by_text() -> None:
    named: Any = ("ca.pem", "a.pem", "a.key")
    assert Credentials(*named) == Credentials(Path("ca.pem"), Path("a.pem"), Path("a.key"))
