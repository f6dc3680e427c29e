"""The images that an engine has built from the Dockerfiles as they are."""

import json
import shutil
from pathlib import Path

import pytest

from deploy.docker.tree import ROOT
from deploy.platforms.checks import large_layer
from deploy.platforms.engine import Engine, needed
from deploy.platforms.images import NAMES, build, layer_bytes_of_its_own

needed()
pytestmark = pytest.mark.timeout(900)
# What a build takes from the tree, and .dockerignore, which says so.
_CONTEXT = ("protos", "server", "worker", "deploy", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def changed(docker: Engine) -> Path:
    """The tree with another line of code in each package."""
    folder = docker.folder / "changed"
    folder.mkdir()
    for name in (*_CONTEXT, ".dockerignore"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for package in ("protos/ormo_runtime", "server/ormo_server", "worker/ormo_worker"):
        with (folder / package / "__init__.py").open("a") as file:
            file.write("\n# Changed.\n")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_code_is_a_small_layer_and_little_work(docker: Engine, changed: Path, name: str) -> None:
    tag = f"ormo-{name}:changed"
    build(docker, name, tag, changed)
    ours = docker.docker("image", "inspect", f"ormo-{name}:local", "-f", "{{.Id}}")
    assert docker.docker("image", "inspect", tag, "-f", "{{.Id}}") != ours, "the change is in the image"
    assert large_layer(f"ormo-{name}", layer_bytes_of_its_own(docker, tag)) == []


@pytest.mark.parametrize("name", NAMES)
def test_image_says_by_itself_how_it_is_run_checked_and_stopped(docker: Engine, name: str) -> None:
    (image,) = json.loads(docker.docker("image", "inspect", f"ormo-{name}:local"))
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"][0] == "CMD"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_pip_s_secrets_is_in_the_image(docker: Engine, name: str) -> None:
    image = f"ormo-{name}:local"
    code = "import pathlib; print([p for p in ('/etc/pip.conf', '/etc/pip-ca.pem') if pathlib.Path(p).exists()])"
    assert docker.docker("run", "--rm", "--entrypoint", "python", image, "-c", code).strip() == "[]"
    assert "find-links" not in docker.docker("history", "--no-trunc", image)
