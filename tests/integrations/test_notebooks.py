"""What a user of a notebook meets: cells that are run twice, edited, interrupted, and kernels that are restarted."""

import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from docs.pages import blocks, text_of
from system.programs import ENVIRONMENT, Stage

pytest.importorskip("ipykernel", reason="`make test-integrations` installs it")
manager = pytest.importorskip("jupyter_client.manager")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

SECONDS = 120.0
TRAIN = """
import torch
from ormo_worker import RemoteOptimizer
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = RemoteOptimizer(model, ADDRESS)
"""
STEPS = """
def step():
    optimizer.zero_grad()
    loss = model(torch.ones(8, 4)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
"""


class Kernel:
    """A real kernel, to which cells are sent as a notebook sends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manager = manager.KernelManager(kernel_name="python3")
        self._start()

    def _start(self) -> None:
        self._manager.start_kernel(cwd=str(self.folder), env=ENVIRONMENT | {"PATH": os.environ["PATH"]})
        self._connect()

    def _connect(self) -> None:
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=SECONDS)

    @property
    def pid(self) -> int:
        return int(self._manager.provisioner.process.pid)

    def send(self, code: str, cell: str = "") -> str:
        """Start a cell, of this id if it has one."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
        content |= {"allow_stdin": False, "stop_on_error": True}
        message = self._client.session.msg("execute_request", content, metadata={"cellId": cell} if cell else {})
        self._client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def shown(self, request: str, until: str = "") -> str:
        """What a cell prints, on stdout and stderr, with its error; to its end, or until it has printed this."""
        text = ""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                message = self._client.get_iopub_msg(timeout=1.0)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            content: dict[str, Any] = message["content"]
            match message["msg_type"]:
                case "stream":
                    text += content["text"]
                case "error":
                    text += f"{content['ename']}: {content['evalue']}"
                case "status" if content["execution_state"] == "idle":
                    return text
            if until and until in text:
                return text
        raise AssertionError(f"the cell did not end in {SECONDS:g} s; it printed {text!r}")

    def ran(self, code: str, cell: str = "") -> str:
        return self.shown(self.send(code, cell))

    def interrupt(self) -> None:
        self._manager.interrupt_kernel()

    def restart(self, *, now: bool) -> None:
        self._client.stop_channels()
        self._manager.restart_kernel(now=now)
        self._connect()

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    try:
        yield made
    finally:
        made.close()


def members(stage: Stage) -> int:
    return len(stage.status().workers)


@pytest.mark.parametrize("scheduler", ["asynchronous", "synchronous"])
def test_a_cell_that_is_run_twice_leaves_no_ghost(stage: Stage, kernel: Kernel, scheduler: str) -> None:
    """Also where the new one's first ticket waits for the old one, which is bound to its name until it has that."""
    stage.server(learning_rate=0.01, scheduler=scheduler)
    cell = TRAIN.replace("ADDRESS", repr(stage.address)) + STEPS + "step(); print(optimizer.iteration)"
    assert kernel.ran(cell) == "1\n"
    shown = kernel.ran(cell)
    assert "the optimizer that an earlier run of this cell made is closed" in shown
    assert shown.endswith("2\n")
    assert members(stage) == 1


def test_an_edited_cell_is_known_by_its_id(stage: Stage, kernel: Kernel) -> None:
    stage.server(learning_rate=0.01, scheduler="synchronous")
    cell = TRAIN.replace("ADDRESS", repr(stage.address)) + STEPS + "step(); print(optimizer.iteration)"
    kernel.ran(cell, "4f2a")
    assert kernel.ran(cell + "  # edited", "4f2a").endswith("2\n")
    assert members(stage) == 1


def test_a_cell_that_was_interrupted_in_a_step_and_is_run_again_leaves_no_ghost(stage: Stage, kernel: Kernel) -> None:
    """The traceback, which IPython keeps, holds the old optimizer."""
    stage.server(learning_rate=0.01)
    cell = TRAIN.replace("ADDRESS", repr(stage.address)) + STEPS + "print('steps')\nwhile True: step()"
    request = kernel.send(cell)
    kernel.shown(request, until="steps")
    kernel.interrupt()
    assert "KeyboardInterrupt" in kernel.shown(request)
    assert members(stage) == 1  # it may be asked to go on
    assert "OrmoError" not in kernel.ran("step()")
    request = kernel.send(cell)
    assert "an earlier run of this cell" in kernel.shown(request, until="steps")
    stage.until(lambda status: len(status.workers) == 1, "the old optimizer has left")
    kernel.interrupt()
    kernel.shown(request)


def test_optimizers_of_other_cells_are_told_of_and_stay(stage: Stage, kernel: Kernel) -> None:
    stage.server(learning_rate=0.01)
    cell = TRAIN.replace("ADDRESS", repr(stage.address))
    assert kernel.ran(cell, "one") == ""
    shown = kernel.ran(cell.replace("optimizer =", "second ="), "two")
    assert "other cells of this notebook have 1 optimizer(s) in the run at" in shown
    assert members(stage) == 2


def test_several_optimizers_of_one_cell_all_stay(stage: Stage, kernel: Kernel) -> None:
    stage.server(learning_rate=0.01)
    several = TRAIN.replace("ADDRESS", repr(stage.address)).replace("RemoteOptimizer(model", "[RemoteOptimizer(m")
    several = several.replace(f"{stage.address}')", f"{stage.address}') for m in (model, torch.nn.Linear(4, 1))]")
    assert kernel.ran(several) == ""
    assert members(stage) == 2


LOCAL = """
import ormo_server
server = ormo_server.local(learning_rate=0.01, directory="run")
print(server.address, server._process.pid)
"""


def server_of(shown: str) -> tuple[str, psutil.Process]:
    address, pid = shown.splitlines()[-1].split()
    return address, psutil.Process(int(pid))


def test_a_server_of_a_cell_that_is_run_twice_is_one_server_that_goes_on_with_its_run(
    stage: Stage, kernel: Kernel
) -> None:
    stage.address, first = server_of(kernel.ran(LOCAL))
    kernel.ran(TRAIN.replace("ADDRESS", "server.address") + STEPS + "step(); step()")
    shown = kernel.ran(LOCAL)
    assert "is closed: another takes its place" in shown
    stage.address, second = server_of(shown)
    assert not first.is_running()
    assert second.is_running()
    assert stage.status().iteration.number == 2


@pytest.mark.parametrize("now", [False, True], ids=["asked to end", "killed"])
def test_a_kernel_that_is_restarted_leaves_no_server_and_the_next_one_goes_on(
    stage: Stage, kernel: Kernel, now: bool
) -> None:
    _, first = server_of(kernel.ran(LOCAL))
    kernel.ran(TRAIN.replace("ADDRESS", "server.address") + STEPS + "step(); step()")
    kernel.restart(now=now)
    stage.address, _ = server_of(kernel.ran(LOCAL))
    first.wait(SECONDS)
    assert stage.status().iteration.number == 2  # it had written a checkpoint


def test_an_interrupted_cell_ends_its_server_and_leaves_nothing(kernel: Kernel) -> None:
    cell = (
        "import tempfile, ormo_server, psutil\ntempfile.tempdir = '.'\n"
        "with ormo_server.local(learning_rate=0.01) as ADDRESS:\n"
        "    print(psutil.Process().children()[-1].pid, flush=True)\n"
    )
    cell += "".join(f"    {line}\n" for line in (TRAIN + STEPS + "print('steps')\nwhile True: step()").splitlines())
    request = kernel.send(cell)
    pid = int(kernel.shown(request, until="steps").split()[0])
    kernel.interrupt()
    assert "KeyboardInterrupt" in kernel.shown(request)
    assert not psutil.pid_exists(pid)
    assert not list(kernel.folder.glob("ormo-local-*"))
    assert kernel.ran("optimizer.close(); print('closed')").endswith("closed\n")


def test_the_page_is_a_notebook_that_runs(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(code) for code in blocks(text_of("with/notebooks.md"), "python")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=resources).execute()
    printed = [output.text for cell in notebook.cells for output in cell.outputs if output.output_type == "stream"]
    assert [text.split(":")[0] for text in printed] == ["iteration 200"] * 2
    assert (tmp_path / "runs" / "notebook" / "latest").exists()
