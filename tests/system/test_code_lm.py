"""Local steps on a language task, by one command: what it prints, beside plain AdamW on as many samples."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ormo_worker.tasks import Score
from ormo_worker.tasks.batches import batches, evaluation_batches
from ormo_worker.tasks.code_lm import CodeLm
from system.programs import Stage, as_flags

STEPS, PUSHES, BATCH, RATE = 16, 24, 2, 0.003
ELEMENTS = 252_864
# By their frequencies in the test set, single characters cost 3.12 nats each; guessing costs 4.85.
LEARNT = 3.2


def figures(stage: Stage, **flags: Any) -> dict[str, float]:
    """What `ormo-local` prints in the end, by name: the first number of each line."""
    local = stage.program("local", *as_flags(flags), module="ormo_worker.local")
    code, output = local.printed()
    assert code == 0, output + local.log.read_text()
    return {
        found[1]: float(found[2].replace(",", "")) for found in re.finditer(r"^ *(\w+ ?\w*)  ([\d,.]+)", output, re.M)
    }


def loss_of_plain_adamw(steps: int) -> float:
    """On the test set, after so many steps in one process."""
    torch.manual_seed(0)
    task = CodeLm()
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _, batch in zip(range(steps), batches(task.train_set(), BATCH, seed=0), strict=False):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    scores = (task.score(model, batch) for batch in evaluation_batches(task.test_set(), 256))
    return sum(scores, Score()).mean_loss


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Two that wait for each other are many times slower where other programs want the processor as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.timeout(300)  # seven processes
def test_unequal_workers_learn_a_language_by_local_steps_and_the_bytes_and_the_time_are_told(stage: Stage) -> None:
    told = figures(
        stage,
        task="code-lm",
        workers=4,
        slow="1:4x",
        inner="adamw",
        inner_lr=RATE,
        local_steps=STEPS,
        batch_size=BATCH,
        stop_after_gradients=PUSHES,
        evaluate_every_seconds=30,
        directory="run",
    )
    assert told["pushes"] == PUSHES
    # float32, both ways, and the parameters that each worker begins with; the last ones may be for nothing.
    moved = 4 * ELEMENTS / 1e6
    assert 2 * PUSHES * moved == pytest.approx(told["moved"], abs=8 * moved + 0.1)
    assert 1 < told["test loss"] < LEARNT
    assert 1 < loss_of_plain_adamw(STEPS * PUSHES) < LEARNT
