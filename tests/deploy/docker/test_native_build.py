"""The images' build steps, and the programs that they install, without a container engine.

All but the base image is the images' own: the build stages' COPYs and RUNs are done as they stand in the Dockerfiles,
and the programs run with the environment, the entry points and the health checks that the images set, as a user who
can write to nothing but the two folders that a container with a read-only root file system has.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy.docker.dockerfile import PROGRAMS, VENV, Dockerfile, Stage, build
from deploy.docker.tree import FOLDER

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("CHECK_IMAGES"), reason="installs PyTorch twice, in minutes: CHECK_IMAGES=1 to do it"
    ),
    pytest.mark.timeout(600),
]


@dataclass
class Container:
    """What stands in for a container of an image: its stage, its programs, and a user without rights."""

    stage: Stage
    root: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    @property
    def programs(self) -> Path:
        return self.root / "programs"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def prepare(self) -> None:
        """Make the folders: two that may be written to, and one, home and working directory, that may not."""
        (self.root / "home").mkdir(mode=0o555)
        for folder in (self.data, self.temporary):
            folder.mkdir()
            if os.geteuid() == 0:
                os.chown(folder, *self._ids())

    def _ids(self) -> tuple[int, int]:
        user, _, group = self.stage.last("USER").value.partition(":")
        return int(user), int(group)

    def _as_user(self) -> list[str]:
        """What to put before a command, so that permissions bind: for root they don't, others stay who they are.

        The right to read is left to it, as the Python that runs the tests may be below root's home.
        """
        if os.geteuid() != 0:
            return []
        user, group = self._ids()
        rights = "-all,+dac_read_search"
        sets = [f"--inh-caps={rights}", f"--ambient-caps={rights}", f"--bounding-set={rights}", "--no-new-privs"]
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *sets, "--"]

    def start(self, command: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
        given = {name: value.replace("/data", str(self.data)) for name, value in self.stage.environment.items()}
        given |= {"PATH": f"{self.venv}/bin:/usr/bin:/bin"}
        given |= {"HOME": str(self.root / "home"), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        program = subprocess.Popen(
            [*self._as_user(), str(self.venv / "bin" / command[0]), *command[1:]],
            cwd=self.root / "home",
            env=given | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(program)
        return program

    def run(self, command: Sequence[str], *, code: int = 0, **environment: str) -> str:
        """The output of a program that must end with this code."""
        program = self.start(command, **environment)
        output, _ = program.communicate(timeout=120)
        assert program.returncode == code, output
        return output

    def entry(self, command: Sequence[str] = ()) -> list[str]:
        """The command line of the image's program."""
        return [*self.stage.last("ENTRYPOINT").exec_form, *(command or self.stage.last("CMD").exec_form)]

    def close(self) -> None:
        for program in self.started:
            if program.poll() is None:
                program.kill()
            program.communicate()


@contextmanager
def contained(name: str, target: str) -> Iterator[Container]:
    # Not below pytest's folder, which only its owner may enter.
    root = Path(tempfile.mkdtemp(prefix="ormo-image-"))
    root.chmod(0o755)
    container = Container(Dockerfile(name).stages[target], root)
    container.prepare()
    try:
        yield container
    finally:
        container.close()
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def images() -> Iterator[dict[str, Container]]:
    """Both of them, built side by side: pip works on one core."""
    files = {"server": ("server.Dockerfile", "server"), "worker": ("worker.Dockerfile", "cpu")}
    with ExitStack() as stack:
        made = {name: stack.enter_context(contained(*file)) for name, file in files.items()}

        def built(name: str) -> None:
            stage, container = Dockerfile(files[name][0]).stages["programs"], made[name]
            build(stage, container.root / "src", container.venv, container.programs)

        with ThreadPoolExecutor(len(made)) as pool:
            list(pool.map(built, made))
        yield made


@pytest.fixture(scope="module")
def server_image(images: dict[str, Container]) -> Container:
    return images["server"]


@pytest.fixture(scope="module")
def worker_image(images: dict[str, Container]) -> Container:
    return images["worker"]


@pytest.fixture
def server(server_image: Container) -> Iterator["subprocess.Popen[str]"]:
    # On a free port, as nothing else keeps the tests of two trees apart.
    program = server_image.start(
        server_image.entry(), ORMO_LISTEN="127.0.0.1:0", ORMO_METRICS_LISTEN="127.0.0.1:0", ORMO_LEARNING_RATE="0.02"
    )
    yield program
    if program.poll() is None:
        program.kill()
        program.wait(10)


def address_of(server: "subprocess.Popen[str]") -> str:
    assert server.stdout is not None
    seen = ""
    for line in server.stdout:
        seen += line
        if line.startswith("serving address="):
            return line.split()[1].removeprefix("address=")
    raise AssertionError(seen)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def soon(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.2)


def installed(container: Container, module: str) -> bool:
    code = f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"
    return container.run(["python", "-c", code]).strip() == "True"


def test_server_image_has_what_it_needs_and_neither_torchvision_nor_pip(server_image: Container) -> None:
    for module in ("torch", "ormo_server", "grpc_health", "prometheus_client"):
        assert installed(server_image, module)
    for module in ("torchvision", "sklearn", "pytest", "pip"):
        assert not installed(server_image, module)


def test_program_can_write_to_nothing_but_the_two_folders(server_image: Container) -> None:
    make = "import pathlib, sys; folder = pathlib.Path(sys.argv[1], 'new'); folder.mkdir(); folder.rmdir()"
    # Whoever is not root runs the programs as themselves, and owns what they have built.
    closed = [server_image.root / "home", *([server_image.venv] if os.geteuid() == 0 else [])]
    for folder in closed:
        assert "PermissionError" in server_image.run(["python", "-c", make, str(folder)], code=1)
    for folder in (server_image.data, server_image.temporary):
        server_image.run(["python", "-c", make, str(folder)])


def test_programs_of_both_images_are_compiled_when_they_are_built(
    server_image: Container, worker_image: Container
) -> None:
    for container, package in ((server_image, "ormo_server"), (worker_image, "ormo_worker")):
        (folder,) = container.venv.glob(f"lib/python3*/site-packages/{package}")
        assert len(list(folder.glob("__pycache__/*.pyc"))) == len(list(folder.glob("*.py")))


def test_a_change_of_code_is_a_layer_without_any_dependency(server_image: Container, worker_image: Container) -> None:
    for container in (server_image, worker_image):
        (packages,) = container.programs.glob("lib/python3*/site-packages")
        assert {path.name.partition("-")[0] for path in packages.iterdir()} == {
            "ormo_parameter_server", "ormo_protos", "ormo_runtime", "ormo_server", "ormo_worker",
        }  # fmt: skip
        size = sum(path.stat().st_size for path in container.programs.rglob("*") if path.is_file())
        assert size < 10e6


def test_worker_image_can_load_every_task(worker_image: Container) -> None:
    code = (
        "from ormo_worker.tasks.images import import_torchvision; print(import_torchvision().__version__)\n"
        "import ormo_worker.tasks.cifar10, ormo_worker.tasks.image_folder, ormo_worker.tasks.digits"
    )
    assert worker_image.run(["python", "-c", code]).startswith("0.")


def test_server_trains_with_a_worker_and_keeps_its_state_without_writing_anywhere_else(
    server_image: Container, worker_image: Container, server: "subprocess.Popen[str]"
) -> None:
    address = address_of(server)
    worker_image.run(
        worker_image.entry(),
        ORMO_SERVER=address,
        ORMO_LEAVE_AFTER_GRADIENTS="20",
        ORMO_METRICS_LISTEN=f"127.0.0.1:{free_port()}",
    )
    status = server_image.run(["ormo-server", "status", "--server", address])
    assert "training, iteration 20, 640 samples" in status
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    model = server_image.data / "run" / "latest" / "model.safetensors"
    assert model.stat().st_size > 0
    # What is left behind anywhere would fill a small /tmp in time.
    assert [
        file for image in (server_image, worker_image) for file in image.temporary.rglob("*") if file.is_file()
    ] == []


def test_evaluator_of_the_worker_image_is_healthy_once_its_metrics_answer_and_leaves_when_told(
    worker_image: Container, server: "subprocess.Popen[str]"
) -> None:
    address = address_of(server)
    listen = f"127.0.0.1:{free_port()}"
    image_command = worker_image.stage.last("HEALTHCHECK").exec_form
    command = [image_command[0], str(FOLDER / Path(image_command[1]).name)]

    def health() -> int:
        check = worker_image.start(command, ORMO_METRICS_LISTEN=listen)
        check.communicate(timeout=30)
        return check.returncode

    assert health() == 1
    evaluator = worker_image.start(worker_image.entry(["evaluate"]), ORMO_SERVER=address, ORMO_METRICS_LISTEN=listen)
    soon(lambda: health() == 0, "the evaluator's metrics answer")
    evaluator.send_signal(signal.SIGTERM)
    output, _ = evaluator.communicate(timeout=30)
    assert evaluator.returncode == 0, output


def test_dockerfiles_run_the_programs_from_where_they_are_installed() -> None:
    for name, targets in (("server.Dockerfile", ["server"]), ("worker.Dockerfile", ["cpu", "cuda"])):
        for target in targets:
            stage = Dockerfile(name).stages[target]
            assert stage.environment["PATH"].startswith(f"{VENV}/bin:")
            copies = [one.value for one in stage.all("COPY")]
            layers = [f"--from=dependencies {VENV} {VENV}", f"--from=programs {PROGRAMS} {VENV}"]
            assert [copy for copy in copies if copy.startswith("--from=")] == layers
