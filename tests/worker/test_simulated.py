"""What the workers of a simulation compute: the same as real ones, bit for bit."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.settings import UsageError
from ormo_runtime.workload import (
    TASKS_OF_THE_WORKER,
    Computed,
    InnerSettings,
    Model,
    SimulatedWorker,
    Workload,
    WorkloadSettings,
    load_workload,
)
from ormo_server.sim.plan import Plan
from ormo_server.sim.settings import SimSettings
from ormo_worker import simulated as module
from ormo_worker import training
from ormo_worker.client.messages import Delivered
from ormo_worker.errors import ModelUnusable, OptionRefused
from ormo_worker.evaluation import Evaluator
from ormo_worker.pytorch.transfer import Staging
from ormo_worker.settings import RunSettings
from ormo_worker.simulated import TaskWorker, TaskWorkload
from ormo_worker.tasks import Task, TaskError, load_task
from ormo_worker.tasks.batches import batches, evaluation_batches
from worker.fake_server import LEARNING_RATE, FakeServer

PECULIAR = "worker.peculiar:Peculiar"
BATCH = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def workload(task: str = PECULIAR, **more: Any) -> TaskWorkload:
    usual: dict[str, Any] = {
        "data_dir": None,
        "batch_size": BATCH,
        "weight_decay": 0.25,
        "device": "cpu",
        "train_samples": 0,
        "test_samples": 0,
    }
    return TaskWorkload(task=task, **usual | more)


class ByHand:
    """One worker with a module of its own and plain autograd."""

    def __init__(self, task: Task, seed: int, data_seed: int) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.module = task.build_model()
        self.module.train()
        self.stream = batches(task.train_set(), BATCH, data_seed)

    def gradient(self, params: Tensor, weight_decay: float) -> tuple[Tensor, float]:
        nn.utils.vector_to_parameters(params, [p for p in self.module.parameters() if p.requires_grad])
        self.module.zero_grad()
        loss = self.task.loss(self.module, next(self.stream))
        loss.backward()
        trained = [named for named in self.module.named_parameters() if named[1].requires_grad]
        parts = [self._decayed(*named, weight_decay) for named in trained]
        return torch.cat([part.flatten() for part in parts]), loss.item()

    def _decayed(self, name: str, parameter: nn.Parameter, weight_decay: float) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(parameter)
        decay = weight_decay * self.task.weight_decay_scale(name, parameter)
        return parameter.grad.add(parameter.detach(), alpha=decay)

    def buffers(self, *, floating: bool) -> Tensor:
        """Those that travel as float32, or as eight bytes."""
        found = [b.flatten() for b in state_of(self.module).values() if _is_short(b) == floating]
        parts = [b.view(torch.int64) if b.dtype == torch.float64 else b for b in found]
        return torch.cat([b.to(torch.float32 if floating else torch.int64) for b in parts] or [torch.empty(0)])


def _is_short(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.dtype != torch.float64


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that travel."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def computed(worker: SimulatedWorker, params: Tensor, ticket: int = 1) -> tuple[Tensor, Computed]:
    out = torch.full_like(params, torch.nan)
    return out, worker.gradient(ticket, params, out)


# Local steps

ADAMW = InnerSettings("adamw", 3e-3, "constant", 0.0)


def moved(worker: SimulatedWorker, params: Tensor, steps: int, progress: float = 0.0) -> tuple[Tensor, Computed]:
    out = torch.full_like(params, torch.nan)
    return out, worker.local_steps(1, params, out, steps=steps, progress=progress)


def by_adamw(module: nn.Module, rate: float) -> torch.optim.Optimizer:
    """With torch's decay, and none for what the task spares."""
    kept = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    spared = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW([{"params": kept}, {"params": spared, "weight_decay": 0.0}], lr=rate)


def test_local_steps_are_those_of_a_plain_loop_and_the_worker_goes_on_with_its_moments() -> None:
    made = workload("code-lm", weight_decay=0.0, inner=ADAMW)
    start = made.initial(1)
    worker, task = made.start_worker(7, start), load_task("code-lm")
    torch.manual_seed(1)
    module = task.build_model().train()
    optimizer, stream = by_adamw(module, 3e-3), batches(task.train_set(), BATCH, 7)
    params = start.params
    for steps in (3, 2):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = task.loss(module, next(stream))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        delta, done = moved(worker, params, steps)
        params = params - delta  # plain averaging with rate 1: the loop goes on where it was, but for rounding
        torch.testing.assert_close(params, nn.utils.parameters_to_vector(module.parameters()), rtol=1e-5, atol=1e-6)
        assert (done.samples, done.loss) == (steps * BATCH, pytest.approx(sum(losses) / steps, rel=1e-5))


def test_each_worker_has_moments_of_its_own() -> None:
    made = workload("code-lm", weight_decay=0.0, inner=ADAMW)
    start = made.initial(0)
    alone = made.start_worker(7, start)
    expected = [moved(alone, start.params, 2)[0] for _ in range(2)]
    one, other = made.start_worker(7, start), made.start_worker(8, start)
    found = []
    for _ in range(2):
        found.append(moved(one, start.params, 2)[0])
        moved(other, start.params, 1)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not torch.equal(*expected)  # for the second begins with the moments of the first, and goes on with the data


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "factor"),
    [
        ("constant", 0.0, 0.9, 1.0),
        ("cosine", 0.0, 0.0, 1.0),
        ("cosine", 0.0, 0.5, 0.5),
        ("cosine", 0.0, 1.0, 0.0),
        ("constant", 0.5, 0.2, 1 / 2000),  # its first step, however far the run is
    ],
)
def test_the_inner_rate_goes_by_the_progress_of_the_run(
    schedule: str, warmup: float, progress: float, factor: float
) -> None:
    inner = InnerSettings("sgd", 0.1, schedule, warmup)
    made = workload("digits", weight_decay=0.0, inner=inner)
    plain = workload("digits", weight_decay=0.0)
    start = made.initial(0)
    delta, _ = moved(made.start_worker(7, start), start.params, 1, progress)
    plain.initial(0)
    gradient, _ = computed(plain.start_worker(7, start), start.params)
    torch.testing.assert_close(delta, 0.1 * factor * gradient, rtol=1e-4, atol=1e-7)


def test_optimizers_whose_steps_were_not_finite_begin_anew() -> None:
    made = workload("code-lm", weight_decay=0.0, inner=ADAMW)
    start = made.initial(0)
    worker, fresh = made.start_worker(7, start), made.start_worker(7, start)
    broken = start.params.clone()
    broken[5] = torch.inf
    assert not moved(worker, broken, 1)[0].isfinite().all()
    moved(fresh, start.params, 1)
    again = made.start_worker(7, start)
    next(again._stream)  # type: ignore[attr-defined]
    assert torch.equal(moved(worker, start.params, 1)[0], moved(again, start.params, 1)[0])


# Gradients


@pytest.mark.parametrize("task", [PECULIAR, "worker.peculiar:Unused", "digits"])
def test_gradients_are_those_of_plain_autograd_and_buffers_the_workers_own(task: str) -> None:
    simulated = workload(task)
    start = simulated.initial(3)
    workers = {seed: simulated.start_worker(seed, start) for seed in (11, 12)}
    own = {seed: ByHand(load_task(task), 3, seed) for seed in workers}
    params = start.params.clone()
    for turn in (11, 12, 12, 11, 12, 11):
        gradient, pushed = computed(workers[turn], params)
        expected, loss = own[turn].gradient(params, 0.25)
        assert torch.equal(gradient, expected)
        assert (pushed.samples, pushed.loss) == (BATCH, loss)
        assert torch.equal(pushed.float_buffers, own[turn].buffers(floating=True))
        assert torch.equal(pushed.int_buffers, own[turn].buffers(floating=False))
        simulated.evaluate(Model(params, pushed.float_buffers, pushed.int_buffers))  # leaves no trace in a worker
        params = params - 0.1 * gradient


def test_a_worker_takes_over_the_statistics_that_the_server_did_not_take_and_goes_on_with_its_own_others() -> None:
    simulated = workload()
    start = simulated.initial(3)
    worker = simulated.start_worker(11, start)
    _, pushed = computed(worker, start.params)
    own = pushed.float_buffers.clone(), pushed.int_buffers.clone()
    assert start.manifest is not None
    mean = next(spec for spec in start.manifest.tensors if spec.name == "norm.running_mean")
    place = slice(mean.offset, mean.offset + mean.elements)
    pushed.float_buffers[mean.offset] = torch.nan
    worker.mend(replace(start, float_buffers=start.float_buffers + 7))
    expected = own[0].clone()
    expected[place] = start.float_buffers[place] + 7
    assert torch.equal(pushed.float_buffers, expected)
    assert torch.equal(pushed.int_buffers, own[1])


@pytest.mark.parametrize("task", ["digits", PECULIAR, "worker.peculiar:Random", "worker.peculiar:BFloat16"])
def test_a_real_worker_pushes_the_same_bits(server: FakeServer, task: str) -> None:
    server.weight_decay = 0.01
    training.run(
        RunSettings(
            server=server.address,
            task=task,
            batch_size=BATCH,
            device="cpu",
            connect_timeout_seconds=5.0,
            leave_after_gradients=5,
            seed=3,
        )
    )
    data_seed = 1234 + server.asked.index("join", 1) + 1  # as the fake server has it
    simulated = workload(task, weight_decay=0.01)
    start = simulated.initial(3)
    others, worker = simulated.start_worker(99, start), simulated.start_worker(data_seed, start)
    params = start.params.clone()
    for pushed, announced in zip(server.gradients, server.announced, strict=True):
        computed(others, params)
        gradient, found = computed(worker, params)
        assert torch.equal(gradient, pushed)
        assert found.loss == announced.loss
        params.sub_(gradient, alpha=LEARNING_RATE)
    assert server.model is not None
    assert torch.equal(server.model.float_buffers, found.float_buffers)
    assert torch.equal(server.model.int_buffers, found.int_buffers)


def test_a_worker_gets_the_buffers_of_the_model_that_it_joins_and_leaves_that_as_it_is() -> None:
    simulated = workload("digits")
    start = simulated.initial(0)
    moved = replace(start, float_buffers=start.float_buffers + 1, int_buffers=start.int_buffers + 5)
    kept = moved.float_buffers.clone()
    _, early = computed(simulated.start_worker(1, start), start.params)
    _, late = computed(simulated.start_worker(1, moved), start.params)
    torch.testing.assert_close(late.float_buffers - early.float_buffers, torch.full_like(kept, 0.9))
    assert (late.int_buffers - early.int_buffers).tolist() == [5, 5]
    assert torch.equal(moved.float_buffers, kept)


def test_buffers_are_good_until_the_worker_itself_computes_again() -> None:
    simulated = workload("digits")
    start = simulated.initial(0)
    one, other = simulated.start_worker(1, start), simulated.start_worker(2, start)
    _, pushed = computed(one, start.params)
    kept = pushed.float_buffers.clone()
    computed(other, start.params)
    simulated.evaluate(start)
    assert torch.equal(pushed.float_buffers, kept)


def test_parameters_are_left_as_they_are() -> None:
    simulated = workload()
    start = simulated.initial(0)
    before = start.params.clone()
    computed(simulated.start_worker(1, start), start.params)
    simulated.evaluate(start)
    assert torch.equal(start.params, before)


def test_a_set_smaller_than_the_batch_is_one_batch() -> None:
    simulated = workload(batch_size=100)
    assert (simulated.batch_samples, simulated.epoch_samples) == (20, 20)
    start = simulated.initial(0)
    assert computed(simulated.start_worker(1, start), start.params)[1].samples == 20


def test_a_thousand_workers_share_one_module(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = workload()
    start = simulated.initial(0)
    monkeypatch.setattr(module, "Staging", None)  # so that no further one can be made
    workers = [simulated.start_worker(seed, start) for seed in range(1000)]
    gradients = {tuple(computed(worker, start.params)[0].tolist()) for worker in workers}
    assert len(gradients) > 900


# Determinism


@pytest.mark.parametrize("task", ["digits", "worker.peculiar:Random"])
def test_the_same_seeds_give_the_same_bits_again_and_in_another_order(task: str) -> None:
    def gradients(simulated: TaskWorkload, turns: list[int]) -> dict[int, list[Tensor]]:
        torch.rand(1)  # what others draw does not matter
        start = simulated.initial(5)
        workers = {seed: simulated.start_worker(seed, start) for seed in (1, 2)}
        found: dict[int, list[Tensor]] = {1: [], 2: []}
        for turn in turns:
            found[turn].append(computed(workers[turn], start.params)[0])
        return found

    first = workload(task)
    expected = gradients(first, [1, 2, 1, 2])
    for again in (gradients(first, [1, 2, 1, 2]), gradients(workload(task), [2, 2, 1, 1])):
        assert all(torch.equal(a, b) for seed in expected for a, b in zip(expected[seed], again[seed], strict=True))
    assert not torch.equal(expected[1][0], expected[1][1])
    assert not torch.equal(expected[1][0], expected[2][0])


def test_the_seed_decides_the_first_model_as_it_does_for_a_worker() -> None:
    simulated = workload("digits")
    one, other, again = simulated.initial(1), simulated.initial(2), simulated.initial(1)
    assert torch.equal(one.params, again.params)
    assert not torch.equal(one.params, other.params)
    torch.manual_seed(1)
    expected = Staging(load_task("digits").build_model()).snapshot()
    for mine, theirs in zip((one.params, one.float_buffers, one.int_buffers), flat(expected), strict=True):
        assert torch.equal(mine, theirs)


def flat(payload: Any) -> tuple[Tensor, Tensor, Tensor]:
    return payload.parameters, payload.float_buffers, payload.int_buffers


# Scores


@pytest.mark.parametrize("task", ["digits", PECULIAR])
def test_scores_are_those_of_the_evaluator(task: str) -> None:
    simulated = workload(task)
    evaluator = Evaluator(load_task(task), torch.device("cpu"), 256)
    start = simulated.initial(2)
    worker = simulated.start_worker(1, start)
    gradient, pushed = computed(worker, start.params)
    trained = Model(start.params - 0.1 * gradient, pushed.float_buffers, pushed.int_buffers)
    for model in (start, trained, start):
        expected = evaluator.evaluate(delivered(load_task(task), model)).score
        found = simulated.evaluate(model)
        assert (found.test_loss, found.test_accuracy) == (expected.mean_loss, expected.accuracy)


def delivered(task: Task, model: Model) -> Delivered:
    torch.manual_seed(2)  # its frozen tensors come, too
    payload = Staging(task.build_model()).snapshot()
    for there, here in zip(flat(payload), (model.params, model.float_buffers, model.int_buffers), strict=True):
        there.copy_(here)
    return Delivered(payload, pb.Iteration(), None, 0)


def test_an_evaluation_looks_at_samples_spread_over_each_set() -> None:
    simulated = workload("worker.lines:Lines", train_samples=3, test_samples=2)
    found = simulated.evaluate(replace(simulated.initial(0), params=torch.tensor([0.0])))
    assert found.train_loss == pytest.approx(9 * (1 + (3 / 7) ** 2 + (3 / 7) ** 2) / 3)  # samples 0, 2, 5
    assert found.test_loss == pytest.approx((3**2 + 6**2) / 2)
    exact = workload("worker.lines:Lines").evaluate(Model(torch.tensor([3.0]), torch.empty(0), torch.empty(0).long()))
    assert (exact.train_loss, exact.test_loss, exact.test_accuracy) == (0.0, 0.0, 1.0)


def test_more_samples_than_there_are_means_all() -> None:
    all_of_them, too_many = workload("digits"), workload("digits", train_samples=10**6, test_samples=10**6)
    assert all_of_them.evaluate(all_of_them.initial(0)) == too_many.evaluate(too_many.initial(0))


@pytest.mark.parametrize("kept_bytes", [0, 400, 2**20])
def test_the_samples_are_read_once_if_they_fit_in_memory(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def reading(dataset: Any, batch_size: int, samples: int) -> Any:
        reads.append(len(dataset))
        return evaluation_batches(dataset, 4, samples)

    simulated = workload()
    start = simulated.initial(0)
    expected = simulated.evaluate(start)
    monkeypatch.setattr(module, "evaluation_batches", reading)
    monkeypatch.setattr(module, "_KEPT_BYTES", kept_bytes)
    simulated = workload()
    reads.clear()
    scores = [simulated.evaluate(start) for _ in range(3)]
    assert scores[0].test_loss == pytest.approx(expected.test_loss)
    assert scores[0] == scores[1] == scores[2]
    # A training sample has 28 bytes, and so has one of the test set.
    assert reads == {0: [20, 10] * 3, 400: [20, 10, 20, 20], 2**20: [20, 10]}[kept_bytes]


def test_a_task_that_changes_what_it_scores_is_given_it_anew() -> None:
    simulated = workload("worker.peculiar:Changing")
    start = simulated.initial(0)
    assert simulated.evaluate(start) == simulated.evaluate(start) == simulated.evaluate(start)


def test_training_samples_are_augmented_for_gradients_and_not_for_scores() -> None:
    simulated, plain = workload("worker.peculiar:Augmenting"), workload()
    start = simulated.initial(0)
    scores = simulated.evaluate(start)
    assert scores.train_loss == plain.evaluate(start).train_loss
    assert computed(simulated.start_worker(1, start), start.params)[1].loss > 10 * scores.train_loss


# What can be wrong


@pytest.mark.parametrize(
    ("task", "kind", "sentence"),
    [
        ("imagenet", TaskError, "there is no task named 'imagenet'"),
        ("image-folder-cnn", TaskError, "the task 'image-folder-cnn' was given no data folder"),
        ("worker.lines:NoData", TaskError, "is empty"),
        ("worker.peculiar:NothingToTest", TaskError, "is empty"),
        ("worker.peculiar:Double", ModelUnusable, "must be torch.float32 or torch.bfloat16"),
        ("worker.peculiar:NegativeDecay", OptionRefused, "at least 0"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_for_the_user(task: str, kind: type[UsageError], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refused:
        workload(task)
    assert refused.type is kind


@pytest.mark.parametrize("device", ["cuda:99", "tpu9000", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_one_sentence_for_the_user(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device is '?{device}'?"):
        workload(device=device)


def test_auto_is_a_device() -> None:
    simulated = workload(device="auto")
    start = simulated.initial(0)
    assert computed(simulated.start_worker(1, start), start.params)[0].isfinite().all()


# The contract


@pytest.mark.parametrize(("contract", "mine"), [(Workload, TaskWorkload), (SimulatedWorker, TaskWorker)])
def test_methods_are_as_the_simulator_calls_them(contract: type, mine: type) -> None:
    for name, method in inspect.getmembers(contract, inspect.isfunction):
        if not name.startswith("_"):
            wanted, found = inspect.signature(method), inspect.signature(getattr(mine, name))
            assert list(found.parameters.values())[1:] == list(wanted.parameters.values())[1:], name


def test_the_simulator_finds_it_and_trains_with_it() -> None:
    settings = WorkloadSettings("digits", None, 32, 0.0, "cpu", 100, 0)
    found = load_workload(TASKS_OF_THE_WORKER, settings)
    assert isinstance(found, TaskWorkload)
    assert (found.epoch_samples, found.batch_samples) == (1437, 32)
    plan = Plan(SimSettings(workers=4, stop_after_gradients=300, learning_rate=0.01, evaluate_every_gradients=300))
    assert plan.run().summary["test_accuracy"] > 0.9


def test_it_needs_no_network() -> None:
    check = "import sys, ormo_worker.simulated; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "grpc" not in done.stdout.split()
