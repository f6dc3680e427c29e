"""Local steps on a language task, by one command: what it prints, beside plain AdamW on as many samples."""

import re
from typing import Any

import pytest

from system.programs import Stage, as_flags

PUSHES, ELEMENTS = 24, 252_864
# By their frequencies in the test set, single characters cost 3.12 nats each; guessing costs 4.85.
LEARNT = 3.2


def figures(stage: Stage, name: str, **flags: Any) -> dict[str, float]:
    """What `ormo-local` prints in the end, by name: the first number of each line."""
    usual = {
        "task": "code-lm",
        "inner": "adamw",
        "inner_lr": 0.003,
        "local_steps": 16,
        "batch_size": 2,
        "stop_after_gradients": PUSHES,
        "evaluate_every_seconds": 30,
        "directory": name,
    }
    local = stage.program(name, *as_flags(usual | flags), module="ormo_worker.local")
    code, output = local.printed()
    assert code == 0, output + local.log.read_text()
    return {
        found[1]: float(found[2].replace(",", "")) for found in re.finditer(r"^ *(\w+ ?\w*)  ([\d,.]+)", output, re.M)
    }


def test_unequal_workers_learn_a_language_by_local_steps_and_the_bytes_and_the_time_are_told(stage: Stage) -> None:
    four = figures(stage, "four", workers=4, slow="1:4x")
    # A mean of one worker's steps, taken in full, is what it has already.
    alone = figures(stage, "alone", workers=1, method="local-sgd", learning_rate=1, momentum=0)
    for found in (four, alone):
        assert found["gradients"] == PUSHES
        assert 1 < found["test loss"] < LEARNT
    # float32, both ways, and the parameters that each worker begins with; the last ones may be for nothing.
    moved = 4 * ELEMENTS / 1e6
    assert 2 * PUSHES * moved == pytest.approx(four["moved"], abs=8 * moved + 0.1)
