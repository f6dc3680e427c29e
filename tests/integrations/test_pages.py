"""The programs that the pages of docs/with/ show are run as they stand, against the server that the page starts."""

import importlib
import re
import shlex
from typing import Any

import pytest

from docs.pages import blocks, text_of
from integrations.pages import program, ran
from system.programs import Stage


def served(stage: Stage, page: str, **changes: Any) -> None:
    """The server that the page starts, with other flags."""
    (command,) = [line for block in blocks(text_of(f"with/{page}.md"), "sh") for line in block.splitlines()]
    words = shlex.split(command.removeprefix("ormo-server serve "))
    given = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    stage.server(**{name.replace("-", "_"): value for name, value in given.items()} | {"directory": "run"} | changes)


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("transformers", r"this worker made 40 steps; the run has 40$"),
        ("lightning", r"this worker made 200 steps; the last loss was 0\.\d+$"),
        ("accelerate", r"the run is over at 200 with a loss of 0\.\d+$"),
        ("peft", r"of \d+ parameters 1024 travelled$"),
        ("timm", r"the run is over at 20 with a loss of [01]\.\d+$"),
    ],
)
def test_the_program_of_a_page_trains_to_the_end_of_the_run(stage: Stage, page: str, says: str) -> None:
    pytest.importorskip(page, reason="`make test-integrations` installs it")
    served(stage, page)
    printed = ran(stage, program(page))
    assert re.search(says, printed.strip()), printed


def test_the_pages_local_steps_with_the_trainer_are_made(stage: Stage) -> None:
    pytest.importorskip("transformers", reason="`make test-integrations` installs it")
    served(stage, "transformers", method="local-ormo", local_steps=4, stop_after_gradients=5)
    code = program("transformers")
    start = code.index("with RemoteOptimizer")
    end = code.index("if optimizer.settings.local_steps:\n") + len("if optimizer.settings.local_steps:\n")
    ran(stage, code[:start] + "if True:\n" + code[end:])
    assert stage.status().samples == 5 * 4 * 8


def test_the_pages_local_steps_with_lightning_are_made(stage: Stage) -> None:
    pytest.importorskip("lightning", reason="`make test-integrations` installs it")
    served(stage, "lightning", method="local-ormo", local_steps=4, stop_after_gradients=5)
    code = program("lightning")
    used = code.index("trainer.fit(Net(), loader)")
    defined = code.index("class NetWithAdamW")
    ran(stage, code[:used] + code[defined:] + "\ntrainer.fit(NetWithAdamW(), loader)\n")
    assert stage.status().samples == 5 * 4 * 16


def test_programs_of_pages_name_callbacks_that_are_there() -> None:
    for page in ("transformers", "lightning", "accelerate"):
        pytest.importorskip(page, reason="`make test-integrations` installs it")
        (name,) = re.findall(r"from (ormo_worker\.integrations\.\w+) import", program(page))
        assert importlib.import_module(name)
