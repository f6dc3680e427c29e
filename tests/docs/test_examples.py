"""The programs of docs/examples/, and those that the pages show, run as they stand."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from docs.pages import EXAMPLES, README, blocks, example, text_of
from system import forked
from system.programs import ENVIRONMENT, Stage

OWN_LOOP = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8")


def ran(stage: Stage, code: str, run: Callable[..., "subprocess.CompletedProcess[str]"] = forked.ran) -> str:
    """What a program with this code prints."""
    script = stage.folder / "loop.py"
    script.write_text(code.replace("127.0.0.1:50051", stage.address))
    done = run(script, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def typed(script: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """`python SCRIPT` with nothing imported before, as one types it; it leaves when its interpreter ends."""
    command, where = [sys.executable, script.name], {"cwd": script.parent, "env": environment}
    return subprocess.run(command, **where, capture_output=True, text=True, timeout=60, check=False)


def rings(stage: Stage) -> None:
    (stage.folder / "rings.py").write_text((EXAMPLES / "rings.py").read_text(encoding="utf-8"))


def test_own_loop_trains_as_it_stands(stage: Stage) -> None:
    stage.server(stop_after_gradients=200, learning_rate=0.02)
    assert OWN_LOOP.count("  # <-") == 5
    printed = ran(stage, OWN_LOOP + "\nprint(float(loss))\n", typed)
    assert stage.status().iteration.number == 200
    assert float(printed) < 0.5  # it begins at about 4, the variance of the targets


def test_the_readme_shows_own_loop_without_its_model_and_data() -> None:
    (shown,) = blocks(README.read_text(encoding="utf-8"), "python")
    loop = OWN_LOOP[OWN_LOOP.index("optimizer = ") :]
    assert shown == f"from ormo_worker import RemoteOptimizer  # <-\n\n{loop}"
    assert shown.splitlines()[0] in OWN_LOOP.splitlines()


def test_frozen_example_takes_the_models_place_and_trains(stage: Stage) -> None:
    stage.server(stop_after_gradients=200, learning_rate=0.02)
    code, count = re.subn(r"^model = .*\n", example("training.md", "frozen"), OWN_LOOP, flags=re.MULTILINE)
    assert count == 1
    told = "\nprint(float(loss), optimizer._outgoing[0].payload.layout.parameters * 4)\n"
    loss, moved = ran(stage, code + told).split()
    assert float(loss) < 2.0
    whole = (4 * 16 + 16 + 16 + 1) * 4
    assert f"a step moves {moved} bytes each way instead of {whole}:" in text_of("training.md")


def test_rings_trains_as_it_stands(stage: Stage) -> None:
    rings(stage)
    command = re.search(r"^ormo-local (--task rings.*)$", text_of("training.md"), re.MULTILINE)
    assert command is not None
    local = stage.program("local", *command[1].split(), module="ormo_worker.local")
    code, output = local.printed()
    assert code == 0, output
    assert float(output.split("test accuracy")[1].split("%")[0]) > 85


def test_two_in_flight_trains_as_it_stands(stage: Stage) -> None:
    stage.server(stop_after_gradients=200, learning_rate=0.01)
    printed = ran(stage, (EXAMPLES / "two_in_flight.py").read_text(encoding="utf-8") + "\nprint(float(loss))\n")
    *counted, loss = printed.split()
    assert counted == ["200", "gradients", "of", "this", "worker", "counted"]
    assert float(loss) < 0.5


def test_transformer_trains_as_it_stands(stage: Stage) -> None:
    stage.server(stop_after_gradients=8, local_steps=8, method="local-ormo")
    code = (EXAMPLES / "transformer.py").read_text(encoding="utf-8")
    assert example("far-apart.md", "transformer") in code
    loss, rate = ran(stage, code + "\nprint(float(loss), inner.param_groups[0]['lr'])\n").split()
    assert float(loss) < 3.5  # it begins at 4.9, as if all 128 symbols were as likely
    assert float(rate) == 0.0
    assert stage.status().samples == 8 * 8 * 16


def test_the_tutorials_command_trains_a_transformer_with_local_steps(stage: Stage) -> None:
    command = re.search(r"^ormo-local (.*--local-steps.*)$", text_of("far-apart.md"), re.MULTILINE)
    assert command is not None
    local = stage.program("local", *command[1].split(), module="ormo_worker.local")
    code, output = local.printed()
    assert code == 0, output
    assert float(output.split("test loss")[1].split()[0]) < 3.2


@pytest.mark.timeout(300)  # three programs, with all that they import
def test_the_loop_with_ddp_is_one_worker_of_several_processes(stage: Stage) -> None:
    server = stage.server(stop_after_gradients=100, learning_rate=0.02)
    command = re.search(r"^torchrun (.*) loop\.py$", text_of("with/ddp.md"), re.MULTILINE)
    assert command is not None
    loop = stage.folder / "loop.py"
    loop.write_text(example("with/ddp.md", "ddp").replace("127.0.0.1:50051", stage.address))
    words = [*command[1].replace("--nproc-per-node 8", "--nproc-per-node 2").split(), loop.name]
    torchrun = stage.program("torchrun", *words, module="torch.distributed.run", environment={"OMP_NUM_THREADS": "1"})
    code, printed = torchrun.printed()
    assert code == 0, torchrun.log.read_text()
    (line,) = printed.splitlines()
    assert line.startswith("iteration 100, loss ")
    assert float(line.split()[-1]) < 2.0  # it begins at about 4, the variance of the targets
    assert stage.status().samples == 100 * 2 * 32
    assert server.log.read_text().count(" joined (rank 0, 1 slot)") == 1


def test_evaluate_and_export_scores_and_writes_what_a_worker_trained(stage: Stage) -> None:
    rings(stage)
    server = stage.server(stop_after_gradients=400, learning_rate=0.05)
    assert stage.worker("w", task="rings.py:Rings").wait() == 0
    printed = ran(stage, (EXAMPLES / "evaluate_and_export.py").read_text(encoding="utf-8"))
    found = re.fullmatch(r"iteration 400: test accuracy ([\d.]+) %\n", printed)
    assert found is not None
    assert float(found[1]) > 85
    assert server.terminate() == 0  # the last gradient is in a checkpoint now
    exported, kept = load_file(stage.folder / "exported.safetensors"), load_file(stage.model())
    assert exported.keys() == kept.keys()
    assert all(exported[name].equal(kept[name]) for name in kept)
