"""`transformers.Trainer` trains as a worker."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ormo_worker import RemoteOptimizer, RunFinished, ServerSchedule
from ormo_worker.errors import OptionRefused
from system.programs import Stage
from worker.fake_server import LEARNING_RATE, FakeServer

transformers = pytest.importorskip("transformers", reason="`make test-integrations` installs it")
OrmoCallback: Any = importlib.import_module("ormo_worker.integrations.transformers").OrmoCallback


class Line(nn.Module):
    """y = w x; the loss is w x, so that the gradient is the mean of x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * x).mean()}


DATA = [{"x": torch.tensor([float(number)])} for number in range(10)]


@pytest.fixture
def model() -> Line:
    return Line()


@pytest.fixture
def optimizer(server: FakeServer, model: Line) -> Iterator[RemoteOptimizer]:
    with RemoteOptimizer(model, server.address) as optimizer:
        yield optimizer


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(
    optimizer: RemoteOptimizer,
    model: nn.Module,
    folder: Path,
    *,
    data: Any = DATA,
    schedule: Any = None,
    callback: Any = None,
    **arguments: Any,
) -> Any:
    given = {"max_steps": 20, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "logging_steps": 1} | arguments
    return InOrder(
        model=model,
        args=transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{"save_strategy": "no"} | given
        ),
        train_dataset=data,
        eval_dataset=data,
        optimizers=(optimizer, ServerSchedule(optimizer) if schedule is None else schedule(optimizer)),
        callbacks=[OrmoCallback() if callback is None else callback],
    )


def test_train_returns_when_the_run_is_over(
    server: FakeServer, model: Line, optimizer: RemoteOptimizer, tmp_path: Path
) -> None:
    server.stop_after = 5
    done = trainer(optimizer, model, tmp_path).train()
    assert done.global_step == len(server.gradients) == 5
    assert optimizer.finished
    assert server.model is not None
    assert model.weight.tolist() == server.model.parameters.tolist()
    with pytest.raises(RunFinished):  # to whoever steps by themselves, as ever
        optimizer.step()


def test_train_in_a_run_that_is_over_trains_nothing(
    server: FakeServer, model: Line, optimizer: RemoteOptimizer, tmp_path: Path
) -> None:
    server.stop_after = 5
    trainer(optimizer, model, tmp_path).train()
    weight = model.weight.item()
    trainer(optimizer, model, tmp_path).train()
    with RemoteOptimizer(late := Line(), server.address) as latecomer:
        trainer(latecomer, late, tmp_path).train()
    assert len(server.gradients) == 5
    assert model.weight.item() == late.weight.item() == weight


def test_the_last_checkpoint_is_written_when_the_run_ends_between_two(
    server: FakeServer, model: Line, optimizer: RemoteOptimizer, tmp_path: Path
) -> None:
    server.stop_after = 5
    trainer(optimizer, model, tmp_path, save_strategy="steps", save_steps=3).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}


def test_a_step_counts_the_samples_of_its_mini_batches_and_shows_the_loss_that_the_trainer_logs(
    server: FakeServer, model: Line, optimizer: RemoteOptimizer, tmp_path: Path
) -> None:
    ours = trainer(optimizer, model, tmp_path, max_steps=4, gradient_accumulation_steps=2)
    ours.train()
    assert [each.samples for each in server.announced] == [8, 2, 8, 2]
    logged = [row["loss"] for row in ours.state.log_history if "loss" in row]
    assert [each.loss for each in server.announced] == pytest.approx(logged, abs=1e-3)
    assert server.gradients[0].item() == pytest.approx((1.5 + 5.5) / 2)


def test_a_language_models_loss_over_all_accumulated_tokens_is_shown(server: FakeServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    row = torch.arange(8)
    data = [{"input_ids": row, "labels": torch.where(row < 8 - each, row, -100)} for each in range(6)]
    with RemoteOptimizer(model, server.address) as optimizer:
        ours = trainer(optimizer, model, tmp_path, data=data, max_steps=3, gradient_accumulation_steps=3,
                       per_device_train_batch_size=2)  # fmt: skip
        ours.train()
    assert [each.samples for each in server.announced] == [6, 6, 6]
    logged = [row["loss"] for row in ours.state.log_history if "loss" in row]
    assert [each.loss for each in server.announced] == pytest.approx(logged, abs=1e-3)
    assert 2.0 < logged[0] < 4.0  # as if all 16 symbols were as likely: 2.8


def test_what_is_evaluated_in_between_is_not_counted(
    server: FakeServer, model: Line, optimizer: RemoteOptimizer, tmp_path: Path
) -> None:
    ours = trainer(optimizer, model, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    ours.train()
    assert [row["step"] for row in ours.state.log_history if "eval_runtime" in row] == [1, 2]
    assert [each.samples for each in server.announced] == [4, 4]


class Square(Line):
    """Its gradient is the weight."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": 0.5 * (self.weight**2).sum() + 0 * x.sum()}


def test_the_first_gradient_after_resuming_is_of_the_servers_parameters(server: FakeServer, tmp_path: Path) -> None:
    model = Square()
    with RemoteOptimizer(model, server.address) as optimizer:
        trainer(optimizer, model, tmp_path, max_steps=4, save_strategy="steps", save_steps=1).train()
    again = Square()
    with RemoteOptimizer(again, server.address) as optimizer:
        done = trainer(optimizer, again, tmp_path, max_steps=5).train(str(tmp_path / "checkpoint-2"))
    assert done.global_step == 5
    assert [each.item() for each in server.gradients] == [2.0 * (1 - LEARNING_RATE) ** step for step in range(7)]


def test_without_inner_a_schedule_of_the_trainers_own_is_refused_with_the_way_out(
    model: Line, optimizer: RemoteOptimizer, tmp_path: Path
) -> None:
    with pytest.raises(OptionRefused, match=r"give it ormo_worker\.ServerSchedule\(optimizer\)"):
        trainer(optimizer, model, tmp_path, schedule=lambda _: None).train()


def test_with_inner_the_trainers_own_schedule_is_the_inner_optimizers(
    server: FakeServer, model: Line, tmp_path: Path
) -> None:
    server.local_steps = 2
    inner = torch.optim.AdamW(model.parameters(), lr=0.5)
    with RemoteOptimizer(model, server.address, inner=inner) as optimizer:
        ours = trainer(optimizer, model, tmp_path, schedule=lambda _: None, max_steps=4)
        ours.train()
    logged = [row["learning_rate"] for row in ours.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert [each.samples for each in server.announced] == [8, 6]
    assert inner.param_groups[0]["lr"] == 0.0


def test_the_learning_rate_that_the_trainer_logs_follows_the_servers_schedule(stage: Stage, tmp_path: Path) -> None:
    stage.server(learning_rate=0.5, schedule="milestones", milestones="2,4", milestone_factor=0.1)
    model = Line()
    with RemoteOptimizer(model, stage.address) as optimizer:
        ours = trainer(optimizer, model, tmp_path / "trainer", max_steps=6)
        ours.train()
    logged = [row["learning_rate"] for row in ours.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_a_trainer_with_another_optimizer_is_told_so(model: Line, tmp_path: Path) -> None:
    other: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptionRefused, match="the trainer's optimizer is a SGD: expected a RemoteOptimizer"):
        trainer(other, model, tmp_path).train()


class BreaksOnce(Line):
    calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 2:
            raise ValueError("the second mini-batch")
        return super().forward(x)


def test_a_train_that_failed_leaves_nothing_behind_for_the_next(server: FakeServer, tmp_path: Path) -> None:
    model, callback = BreaksOnce(), OrmoCallback()
    with RemoteOptimizer(model, server.address) as optimizer:
        with pytest.raises(ValueError, match="the second mini-batch"):
            trainer(optimizer, model, tmp_path, callback=callback).train()
        trainer(optimizer, model, tmp_path, callback=callback, max_steps=1).train()
    assert [each.samples for each in server.announced] == [4, 4]
    assert not model._forward_hooks
