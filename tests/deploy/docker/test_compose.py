import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.docker import compose
from deploy.docker.tree import FOLDER, ROOT, tool
from ormo_runtime.settings import Settings
from ormo_runtime.settings_loader import read_settings
from ormo_server.service.resources import threads_needed
from ormo_server.settings import ServerSettings
from ormo_worker.settings import EvaluateSettings, RunSettings

OURS: dict[tuple[str, str], type[Settings]] = {
    ("ormo-server", "serve"): ServerSettings,
    ("ormo-worker", "run"): RunSettings,
    ("ormo-worker", "evaluate"): EvaluateSettings,
}
# For a checkpoint to a slow disk: a model of a few GB at 100 MB/s. The server makes no promise about it.
CHECKPOINT_SECONDS = 60
NAMES = list(compose.services())


@pytest.fixture(params=NAMES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = compose.services()[request.param]
    return found


def settings_of(service: dict[str, Any]) -> Settings:
    """As the program in the container reads them: what the image sets, what the file sets, and the command's flags."""
    stage = compose.image(service)
    assert stage is not None
    command, *flags = service.get("command") or stage.last("CMD").exec_form
    cls = OURS[stage.last("ENTRYPOINT").exec_form[0], command]
    given = {name: str(value) for name, value in service["environment"].items()}
    for name in given:
        known = name.removeprefix("ORMO_").lower() in cls.model_fields
        assert known or not name.startswith("ORMO_"), f"{name} means nothing to {cls.__name__}"
    return read_settings(cls, flags, stage.environment | given, program=command)


def ours() -> dict[str, dict[str, Any]]:
    return {name: service for name, service in compose.services().items() if "build" in service}


def example() -> dict[str, str]:
    lines = [line for line in (FOLDER / "example.env").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def host_paths(service: dict[str, Any]) -> dict[str, Path]:
    """Where in the container which part of the tree is mounted."""
    mounts = [volume.split(":") for volume in service.get("volumes", []) if volume.startswith(".")]
    return {parts[1]: (FOLDER / parts[0]).resolve() for parts in mounts}


def test_file_follows_the_compose_specification() -> None:
    ran = subprocess.run(
        [tool("check-jsonschema", "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(compose.PATH)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", list(ours()))
def test_program_understands_all_that_its_service_sets(name: str) -> None:
    settings_of(ours()[name])


def test_example_names_every_variable_with_its_default_and_no_other() -> None:
    assert example() == compose.variables()


def test_a_variable_gets_through_to_the_programs() -> None:
    changed = compose.services({"ORMO_METHOD": "asgd", "ORMO_LEARNING_RATE": "0.5", "ORMO_BATCH_SIZE": "7"})
    server, worker = settings_of(changed["server"]), settings_of(changed["worker"])
    assert isinstance(server, ServerSettings)
    assert isinstance(worker, RunSettings)
    assert (server.method, server.learning_rate, worker.batch_size) == ("asgd", 0.5, 7)


def test_workers_and_evaluator_ask_the_server_where_it_listens() -> None:
    server = settings_of(ours()["server"])
    assert isinstance(server, ServerSettings)
    for name, service in ours().items():
        if name != "server":
            settings = settings_of(service)
            assert isinstance(settings, RunSettings | EvaluateSettings)
            assert settings.server == f"server:{server.listen.rpartition(':')[2]}"
            assert service["depends_on"]["server"]["condition"] == "service_healthy"


def test_health_of_the_server_is_asked_as_its_image_does() -> None:
    stage = compose.image(ours()["server"])
    assert stage is not None
    word, *command = ours()["server"]["healthcheck"]["test"]
    assert word == "CMD"
    assert command == stage.last("HEALTHCHECK").exec_form


def test_every_service_has_a_health_check(service: dict[str, Any]) -> None:
    stage = compose.image(service)
    checks = "healthcheck" in service or (stage is not None and stage.last("HEALTHCHECK").exec_form)
    assert checks


def test_server_has_time_to_drain_and_to_write_a_checkpoint() -> None:
    service = ours()["server"]
    settings = settings_of(service)
    assert isinstance(settings, ServerSettings)
    assert compose.seconds(service["stop_grace_period"]) >= settings.drain_seconds + CHECKPOINT_SECONDS


def test_checkpoints_outlive_the_container() -> None:
    server = settings_of(ours()["server"])
    assert isinstance(server, ServerSettings)
    mounted = [volume.split(":")[1] for volume in ours()["server"]["volumes"]]
    assert any(server.directory.is_relative_to(path) for path in mounted)


def test_model_that_fits_the_memory_limit_leaves_room_in_the_container() -> None:
    service = ours()["server"]
    settings = settings_of(service)
    assert isinstance(settings, ServerSettings)
    assert settings.memory_limit_bytes is not None
    assert service["deploy"]["resources"]["limits"]["memory"] == "2g"
    assert settings.memory_limit_bytes + 2**29 <= 2 * 2**30, "512 MiB for Python, PyTorch and the health check"


def test_server_may_have_the_threads_that_it_needs() -> None:
    settings = settings_of(ours()["server"])
    assert isinstance(settings, ServerSettings)
    limit = ours()["server"]["deploy"]["resources"]["limits"]["pids"]
    assert threads_needed(settings) + 20 <= limit, "20 for the first process, the health check, and whoever looks in"


def test_server_may_have_a_descriptor_for_each_connection_and_for_files_besides() -> None:
    settings = settings_of(ours()["server"])
    assert isinstance(settings, ServerSettings)
    limits = ours()["server"]["ulimits"]["nofile"]
    assert limits["soft"] == limits["hard"]
    people = settings.max_workers + settings.max_readers
    assert limits["soft"] > 1000 + 2 * (2 * people + 256), "as docs/security.md has it, for IPv4 and IPv6"


def test_only_this_machine_reaches_the_ports(service: dict[str, Any]) -> None:
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    assert "network_mode" not in service


def test_service_has_no_more_rights_than_it_needs(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)
    stage = compose.image(service)
    user = service.get("user") or (stage.last("USER").value if stage else "")
    assert int(user.partition(":")[0]) > 0, "a number, and not root's"


def test_service_is_bounded_in_memory_processors_processes_and_logs(service: dict[str, Any]) -> None:
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])


def test_service_that_fails_comes_back_and_one_that_ends_does_not(service: dict[str, Any]) -> None:
    assert service["restart"].startswith("on-failure")


def test_image_of_others_is_pinned_to_a_version(service: dict[str, Any]) -> None:
    if "build" not in service:
        assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", service["image"])


def test_python_image_is_that_of_the_dockerfiles() -> None:
    for service in ours().values():
        recipe = service["build"]
        given = compose.Dockerfile(Path(recipe["dockerfile"]).name).arguments["PYTHON_IMAGE"]
        assert recipe["args"]["PYTHON_IMAGE"] == given


def test_what_is_mounted_from_the_tree_is_there_and_read_only(service: dict[str, Any]) -> None:
    for path in host_paths(service).values():
        assert path.is_relative_to(ROOT)
        assert path.is_dir()
    assert all(volume.endswith(":ro") for volume in service.get("volumes", []) if volume.startswith("."))


def test_named_volumes_are_declared() -> None:
    declared = set(yaml.safe_load(compose.PATH.read_text())["volumes"])
    used = {
        volume.split(":")[0]
        for service in compose.services().values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }
    assert used == declared


def test_prometheus_finds_in_its_targets_what_its_configuration_reads() -> None:
    prometheus = compose.services()["prometheus"]
    (config_flag,) = (flag for flag in prometheus["command"] if flag.startswith("--config.file="))
    config_path = Path(config_flag.partition("=")[2])
    mounts = host_paths(prometheus)
    config = yaml.safe_load((mounts[str(config_path.parent)] / config_path.name).read_text())
    read = {file for job in config["scrape_configs"] for sd in job.get("file_sd_configs", []) for file in sd["files"]}
    here = mounts[str(config_path.parent / "targets")]
    assert read == {f"targets/{path.name}" for path in here.iterdir()}
    # A mount needs a folder to be mounted over, and the one below it is read-only.
    assert (mounts[str(config_path.parent)] / "targets").is_dir()


def test_targets_are_the_metrics_ports_of_the_services() -> None:
    targets = {
        target
        for path in (FOLDER / "targets").iterdir()
        for group in yaml.safe_load(path.read_text())
        for target in group["targets"]
    }
    expected = set()
    for name in ("server", "evaluator"):
        settings = settings_of(ours()[name])
        assert isinstance(settings, ServerSettings | EvaluateSettings)
        expected.add(f"{name}:{settings.metrics_listen.rpartition(':')[2]}")
    assert targets == expected


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    grafana = compose.services()["grafana"]
    mounts = host_paths(grafana)
    provisioning = mounts["/etc/grafana/provisioning"]
    (sources,) = (provisioning / "datasources").glob("*.y*ml")
    urls = [source["url"] for source in yaml.safe_load(sources.read_text())["datasources"]]
    assert urls == ["http://prometheus:9090"]
    (providers,) = (provisioning / "dashboards").glob("*.y*ml")
    paths = [provider["options"]["path"] for provider in yaml.safe_load(providers.read_text())["providers"]]
    assert all(path in mounts and list(mounts[path].glob("*.json")) for path in paths)


def test_no_password_is_in_the_files_and_nobody_but_a_viewer_can_get_in() -> None:
    environment = compose.services()["grafana"]["environment"]
    assert not [name for name in environment if "PASSWORD" in name or "SECRET" in name]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
