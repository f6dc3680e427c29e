"""deploy/docker/compose.yaml as it is, run by Docker Compose."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import yaml

from deploy.docker import compose
from deploy.docker.tree import FOLDER
from deploy.platforms.certificates import Certificates
from deploy.platforms.checks import Ending
from deploy.platforms.engine import Engine
from deploy.platforms.platform import Platform, Role
from deploy.prometheus.prometheus import Prometheus

WORKERS = 3
_SERVICES = ("server", "worker", "evaluator", "prometheus")
_SERVER = {"ORMO_JOURNAL": "true", "ORMO_FAILURE_TIMEOUT_SECONDS": "3"}
_GUARDED = {"ORMO_INSECURE": "false", "ORMO_ACCESS": "/tls/access.toml", "ORMO_TLS_CLIENT_CA": "/tls/ca.crt"}
_PEER = {"ORMO_FAILURE_TIMEOUT_SECONDS": "3"}


class ComposeRun(Platform):
    """What one starts on a laptop, with three workers.

    Args:
        engine: has the images.
        certificates: for who speaks TLS; None: nobody does.
    """

    patience_seconds = 90.0

    def __init__(self, engine: Engine, certificates: Certificates | None) -> None:
        self.engine = engine
        self.guarded = certificates is not None
        self._certificates = certificates
        self._override = engine.folder / "override.yaml"
        self._override.write_text(yaml.safe_dump({"services": self._settings()}))

    def _settings(self) -> dict[str, Any]:
        """What compose.yaml has no variable for: a journal, short leases, certificates."""
        services = {"server": dict(_SERVER), "worker": dict(_PEER), "evaluator": dict(_PEER)}
        if self._certificates is None:
            return {name: {"environment": settings} for name, settings in services.items()}
        services["server"] |= _GUARDED
        for name in services:
            services[name] |= {"ORMO_TLS_CERT": "/tls/tls.crt", "ORMO_TLS_KEY": "/tls/tls.key"}
            if name != "server":
                services[name]["ORMO_TLS_CA"] = "/tls/ca.crt"
        return {
            name: {"environment": settings, "volumes": [f"{self._certificates.folder(name)}:/tls:ro"]}
            for name, settings in services.items()
        }

    def compose(self, *words: object, seconds: float = 300.0) -> str:
        """A command of `docker compose` on the file as it is, and what the tests set besides."""
        # Not the .env of whoever works here.
        files = ["--env-file", FOLDER / "example.env", "-f", compose.PATH, "-f", self._override]
        return self.engine.docker("compose", *files, *words, seconds=seconds, env={"ORMO_LOG_FORMAT": "json"})

    def start(self) -> None:
        """Everything but Grafana, which can't be had; AssertionError with the logs if that does not get healthy."""
        try:
            self._up(WORKERS, *_SERVICES)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('logs', '--tail', 5)}") from None

    def _up(self, workers: int, *services: str) -> None:
        words = ["--detach", "--no-build", "--no-recreate", "--wait", "--scale", f"worker={workers}"]
        self.compose("up", *words, *services)

    def close(self) -> None:
        """Nothing stays, neither volumes."""
        self.compose("down", "--volumes", "--timeout", "2")

    def pods(self, role: Role) -> list[str]:
        return self.compose("ps", "--status", "running", "--format", "{{.Name}}", role).split()

    def execute(self, pod: str, *command: str) -> str:
        return self.engine.docker("exec", pod, *command)

    def log(self, pod: str) -> list[str]:
        stdout, stderr = self.engine.both_outputs(pod)
        return stdout + stderr

    def is_healthy(self, pod: str) -> bool:
        return bool(self._state(pod).get("Health", {}).get("Status") == "healthy")

    def lives(self, pod: str) -> int:
        return int(self._inspect(pod)["RestartCount"]) + 1

    def scale(self, workers: int) -> None:
        self._up(workers, "worker")

    def evict(self, worker: str) -> Ending:
        ending = self._ended(worker)
        self.engine.docker("start", worker)
        return ending

    def drain(self) -> None:
        workers = len(self.pods("worker"))
        self.compose("stop")
        self._up(workers, *_SERVICES)

    def replace_certificates(self) -> None:
        assert self._certificates is not None
        self._certificates.renew()

    @contextlib.contextmanager
    def cut_off(self, pod: str) -> Iterator[None]:
        networks = list(self._inspect(pod)["NetworkSettings"]["Networks"])
        for network in networks:
            self.engine.docker("network", "disconnect", network, pod)
        try:
            yield
        finally:
            for network in networks:
                self.engine.docker("network", "connect", network, pod)

    def prometheus(self) -> Prometheus:
        port = compose.variables()["PROMETHEUS_PORT"]
        return Prometheus(f"http://127.0.0.1:{port}", None, self.engine.folder / "engine.log")

    def stop(self) -> list[Ending]:
        pods = [*self.pods("worker"), *self.pods("evaluator"), *self.pods("server")]
        return [self._ended(pod) for pod in pods]

    def _ended(self, pod: str) -> Ending:
        grace_seconds = float(self._inspect(pod)["Config"]["StopTimeout"])
        began = time.monotonic()
        self.engine.docker("stop", pod)
        return Ending(pod, int(self._state(pod)["ExitCode"]), 0, time.monotonic() - began, grace_seconds)

    def _state(self, pod: str) -> dict[str, Any]:
        state: dict[str, Any] = self._inspect(pod)["State"]
        return state

    def _inspect(self, pod: str) -> dict[str, Any]:
        (found,) = json.loads(self.engine.docker("inspect", pod))
        inspected: dict[str, Any] = found
        return inspected
