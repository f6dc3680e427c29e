"""Lightning's `Trainer` trains as a worker."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integrations.pages import ran
from ormo_worker import RemoteOptimizer, RunFinished, ServerSchedule
from ormo_worker.errors import OptionRefused
from system.programs import Stage
from worker.fake_server import LEARNING_RATE, FakeServer

lightning = pytest.importorskip("lightning.pytorch", reason="`make test-integrations` installs it")
OrmoCallback: Any = importlib.import_module("ormo_worker.integrations.lightning").OrmoCallback
# Batches of 4, 4 and 2 samples.
DATA = torch.utils.data.DataLoader([torch.tensor([float(number)]) for number in range(10)], batch_size=4)  # type: ignore[arg-type]


class Line(lightning.LightningModule):
    """y = w x; the loss is w x, so that the gradient is the mean of x."""

    def __init__(self, address: str, optimizer: Any = None, schedule: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.address, self.schedule = address, schedule
        self.remote: Any = optimizer

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return (self.weight * batch).mean()

    def configure_optimizers(self) -> Any:
        self.remote = RemoteOptimizer(self, self.address) if self.remote is None else self.remote
        if self.schedule is None:
            return self.remote
        return {"optimizer": self.remote, "lr_scheduler": {"scheduler": self.schedule(self.remote), "interval": "step"}}


class Square(Line):
    """Its gradient is the weight."""

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return 0.5 * (self.weight**2).sum() + 0 * batch.sum()


def trainer(folder: Path, *more: Any, **options: Any) -> Any:
    given = {"max_epochs": 4, "logger": False, "enable_checkpointing": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=[OrmoCallback(), *more], **quiet, **given
    )


def left(server: FakeServer) -> bool:
    return not server.members


@pytest.mark.parametrize("options", [{}, {"min_steps": 8}, {"min_epochs": 3}], ids=str)
def test_fit_returns_when_the_run_is_over(server: FakeServer, tmp_path: Path, options: Any) -> None:
    server.stop_after = 5
    module = Line(server.address)
    trainer(tmp_path, **options).fit(module, DATA)
    assert len(server.gradients) == 5
    assert module.remote.finished
    assert server.model is not None
    assert module.weight.tolist() == server.model.parameters.tolist()


def test_fit_in_a_run_that_is_over_trains_nothing(server: FakeServer, tmp_path: Path) -> None:
    server.stop_after = 5
    trainer(tmp_path).fit(Line(server.address), DATA)
    late, ours = Line(server.address), trainer(tmp_path)
    ours.fit(late, DATA)
    assert (len(server.gradients), ours.global_step) == (5, 0)
    assert server.model is not None
    assert late.weight.tolist() == server.model.parameters.tolist()


def test_without_the_callback_the_end_is_an_exception_as_in_any_loop(server: FakeServer, tmp_path: Path) -> None:
    server.stop_after = 2
    ours = trainer(tmp_path)
    ours.callbacks = [each for each in ours.callbacks if not isinstance(each, OrmoCallback)]
    module = Line(server.address)
    with pytest.raises(RunFinished):
        ours.fit(module, DATA)
    module.remote.close()


def test_a_step_counts_the_samples_of_its_mini_batches_and_shows_their_mean_loss(
    server: FakeServer, tmp_path: Path
) -> None:
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(Line(server.address), DATA)
    assert [each.samples for each in server.announced] == [8, 2]
    weight = 2.0 - LEARNING_RATE * (1.5 + 5.5) / 2
    assert [each.loss for each in server.announced] == pytest.approx([2.0 * (1.5 + 5.5) / 2, 8.5 * weight])


def test_each_optimizer_of_a_manual_loop_counts_its_own(server: FakeServer, tmp_path: Path) -> None:
    other = FakeServer().start()

    class Two(Line):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__(server.address)
            self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def training_step(self, batch: Tensor, _: int) -> None:  # type: ignore[override]
            for optimizer, part, factor in zip(self.optimizers(), (self.first, self.second), (1.0, 3.0), strict=True):
                optimizer.zero_grad()
                self.manual_backward(0 * part(batch).sum() + factor)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                RemoteOptimizer(self.first, server.address),
                RemoteOptimizer(self.second, other.address),
            ]

    try:
        trainer(tmp_path, max_epochs=1).fit(Two(), DATA)
        assert [(each.samples, each.loss) for each in server.announced] == [(4, 1.0), (4, 1.0), (2, 1.0)]
        assert [(each.samples, each.loss) for each in other.announced] == [(4, 3.0), (4, 3.0), (2, 3.0)]
        assert left(server)
        assert left(other)
    finally:
        other.stop()


def test_fit_leaves_the_run_when_it_returns_or_fails(server: FakeServer, tmp_path: Path) -> None:
    class Breaks(Line):
        def training_step(self, batch: Tensor, number: int) -> Tensor:
            if number == 1:
                raise ValueError("the second mini-batch")
            return super().training_step(batch, number)

    trainer(tmp_path, max_epochs=1).fit(Line(server.address), DATA)
    assert left(server)
    with pytest.raises(ValueError, match="the second mini-batch"):
        trainer(tmp_path).fit(Breaks(server.address), DATA)
    assert left(server)


@pytest.mark.parametrize("where", ["in configure_optimizers", "before fit"])
def test_the_first_gradient_after_resuming_is_of_the_servers_parameters(
    server: FakeServer, tmp_path: Path, where: str
) -> None:
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Square(server.address), DATA)
    first.save_checkpoint(tmp_path / "old.ckpt")
    trainer(tmp_path, max_epochs=1).fit(Square(server.address), DATA)  # another worker goes on
    again = Square(server.address)
    if where == "before fit":
        again.remote = RemoteOptimizer(again, server.address)
    resumed = trainer(tmp_path, max_epochs=2)
    resumed.fit(again, DATA, ckpt_path=tmp_path / "old.ckpt")
    assert resumed.global_step == 6
    assert [each.item() for each in server.gradients] == [2.0 * (1 - LEARNING_RATE) ** step for step in range(9)]


def test_the_monitor_reads_the_servers_learning_rate(stage: Stage, tmp_path: Path) -> None:
    stage.server(learning_rate=0.5, schedule="milestones", milestones="2,4", milestone_factor=0.1)
    monitor = lightning.callbacks.LearningRateMonitor("step")
    logger = lightning.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, monitor, max_steps=6, logger=logger, log_every_n_steps=1).fit(Line(stage.address), DATA)
    (seen,) = monitor.lrs.values()
    assert seen == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005])


def test_the_servers_schedule_is_taken_for_a_scheduler(stage: Stage, tmp_path: Path) -> None:
    stage.server(learning_rate=0.5, schedule="milestones", milestones="2,4", milestone_factor=0.1)
    monitor = lightning.callbacks.LearningRateMonitor("step")
    module = Line(stage.address, schedule=ServerSchedule)
    logger = lightning.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, monitor, max_steps=6, logger=logger, log_every_n_steps=1).fit(module, DATA)
    (seen,) = monitor.lrs.values()
    assert seen == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005])
    assert module.lr_schedulers().last_epoch == 6


def test_with_inner_a_scheduler_of_torchs_sets_the_inner_optimizers_rate(server: FakeServer, tmp_path: Path) -> None:
    server.local_steps = 3
    module = Line(server.address)
    inner = torch.optim.AdamW(module.parameters(), lr=0.5)
    module.remote = RemoteOptimizer(module, server.address, inner=inner)
    module.schedule = lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=6)
    trainer(tmp_path, max_epochs=2).fit(module, DATA)
    assert inner.param_groups[0]["lr"] == 0.0
    assert [(each.local_steps, each.samples) for each in server.announced] == [(3, 10), (3, 10)]


def test_a_module_with_another_optimizer_is_told_so(tmp_path: Path) -> None:
    module = Line("")
    module.remote = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(OptionRefused, match="the module's optimizers are SGD: expected a RemoteOptimizer"):
        trainer(tmp_path).fit(module, DATA)


TWO_DEVICES = """
import lightning as L, torch
from ormo_worker import RemoteOptimizer
from ormo_worker.integrations.lightning import OrmoCallback

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def training_step(self, batch, _):
        return torch.nn.functional.mse_loss(self.net(batch), batch.sum(1, keepdim=True))

    def configure_optimizers(self):
        return RemoteOptimizer(self, "127.0.0.1:50051", process_group=torch.distributed.group.WORLD)

    def on_train_batch_start(self, batch, number):
        if self.trainer.fit_loop.epoch_loop.global_step in (0, 4):
            self.tell("starts")

    def on_train_end(self):
        self.tell("ends")

    def tell(self, what):
        total = float(sum(each.double().sum() for each in self.parameters()))
        print(what, self.global_rank, self.trainer.global_step, total, flush=True)

loader = torch.utils.data.DataLoader(list(torch.randn(64, 4)), batch_size=8)
def trainer(**more):
    return L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", callbacks=[OrmoCallback()], logger=False,
                     enable_progress_bar=False, enable_model_summary=False, **more)
first = trainer(max_epochs=1, default_root_dir="logs")
first.fit(Net(), loader)
trainer(max_epochs=-1).fit(Net(), loader, ckpt_path=first.checkpoint_callback.best_model_path)
"""


def test_two_devices_are_one_worker_also_when_they_resume(stage: Stage) -> None:
    stage.server(learning_rate=0.01, stop_after_gradients=10)
    printed = [line.split() for line in ran(stage, TWO_DEVICES).splitlines() if line.startswith(("starts", "ends"))]
    totals: dict[tuple[str, str], set[str]] = {}
    for what, _, step, total in printed:
        totals.setdefault((what, step), set()).add(total)
    assert len(printed) == 8  # of two ranks in two fits
    assert {len(each) for each in totals.values()} == {1}  # the ranks never differ
    assert totals["starts", "4"] == totals["ends", "4"]
    assert ("ends", "10") in totals
    assert stage.status().samples == 10 * 2 * 8
