"""A real Prometheus for tests: started on a free loopback port with a folder of configuration, asked over its API."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# A proxy of the environment must not stand between a test and a loopback port.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_READY_SECONDS = 20.0
# The first scrape comes 5 s after the start, whatever the scrape interval is.
_UP_SECONDS = 25.0


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`. Without it the test is skipped, but fails where `CI=true`."""
    path = shutil.which(name)
    if path is not None:
        return path
    reason = f"`{name}` is not installed: get it from the package `prometheus` or from its releases"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Sample:
    """One series of an answer, at the moment of the query."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Alert:
    """One active alert; `state` is `pending` or `firing`."""

    name: str
    state: str
    labels: dict[str, str]
    annotations: dict[str, str]


@dataclass(frozen=True, slots=True)
class Rule:
    """One loaded rule; `type` is `alerting` or `recording`, `health` `ok`, `err` or `unknown` (not evaluated yet)."""

    group: str
    name: str
    type: str
    query: str
    health: str
    last_error: str


class Prometheus:
    """A Prometheus that runs.

    Args:
        url: where it answers.
        process: its own; None in a container.
        log: the file with what it logs.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None, log: Path) -> None:
        self.url = url
        self.log = log
        self._process = process

    def query(self, expression: str) -> list[Sample]:
        """The value of each series of an instant vector, or of a scalar (one sample without labels)."""
        result = self._get("query", query=expression)
        if result["resultType"] == "scalar":
            return [Sample({}, float(result["result"][1]))]
        assert result["resultType"] == "vector", f"{expression} is a {result['resultType']}: use query_range"
        return [Sample(series["metric"], float(series["value"][1])) for series in result["result"]]

    def query_range(self, expression: str, *, seconds: float, step_seconds: float = 1.0) -> list[dict[str, Any]]:
        """The API's own series (`metric`, `values`) over the last so many seconds, as a dashboard asks for them."""
        now = time.time()
        result = self._get("query_range", query=expression, start=now - seconds, end=now, step=step_seconds)
        series: list[dict[str, Any]] = result["result"]
        return series

    def alerts(self, name: str | None = None, *, state: str | None = None) -> list[Alert]:
        """Active alerts, of one name and one state if given."""
        found = [
            Alert(alert["labels"]["alertname"], alert["state"], alert["labels"], alert["annotations"])
            for alert in self._get("alerts")["alerts"]
        ]
        return [a for a in found if name in (None, a.name) and state in (None, a.state)]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {alert.name for alert in self.alerts(state="firing")}

    def rules(self) -> list[Rule]:
        """All rules that it has loaded."""
        return [
            Rule(group["name"], rule["name"], rule["type"], rule["query"], rule["health"], rule.get("lastError", ""))
            for group in self._get("rules")["groups"]
            for rule in group["rules"]
        ]

    def targets(self) -> dict[str, list[str]]:
        """Per job the health of each of its targets: `up`, `down` or `unknown`."""
        healths: dict[str, list[str]] = {}
        for target in self._get("targets", state="active")["activeTargets"]:
            healths.setdefault(target["labels"]["job"], []).append(target["health"])
        return healths

    def until_up(self, *jobs: str, seconds: float = _UP_SECONDS) -> None:
        """Wait until every target of the jobs has been scraped, and at least one of each is there."""

        def all_up() -> bool:
            seen = self.targets()
            return all(seen.get(job) and set(seen[job]) == {"up"} for job in jobs)

        self.until(all_up, f"all targets of {', '.join(jobs)} up", seconds=seconds)

    def until(self, condition: Callable[[], object], what: str, *, seconds: float) -> None:
        """Wait for something that is to come true.

        Raises:
            AssertionError: it did not in time; says what is up, what alerts, and what was logged.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"not in {seconds:g} s: {what}; targets {self.targets()}, "
                f"alerts {[(a.name, a.state, a.labels) for a in self.alerts()]}, log:\n{self.log.read_text()}"
            )
            time.sleep(0.1)

    def reload(self) -> None:
        """Read the configuration again; new targets are scraped up to 5 s later. Files of targets are watched too."""
        with _DIRECT.open(urllib.request.Request(f"{self.url}/-/reload", method="POST"), timeout=10):
            pass

    def is_ready(self) -> bool:
        """Whether it answers queries. That is no proof that it has scraped anything."""
        try:
            with _DIRECT.open(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def has_ended(self) -> bool:
        """Whether its process is no more."""
        return self._process.poll() is not None

    def _get(self, path: str, **parameters: object) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with _DIRECT.open(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path} {parameters}: {json.load(error).get('error')}") from None


@contextlib.contextmanager
def prometheus(folder: Path, *, up: Sequence[str] = ()) -> Iterator[Prometheus]:
    """Run Prometheus until the block ends.

    Args:
        folder: has `prometheus.yml`, and what that names; data and the log go there too.
        up: jobs whose targets must all be up before the block begins.
    """
    server = _started(folder)
    try:
        if up:
            server.until_up(*up)
        yield server
    finally:
        _end(server._process)


def _started(folder: Path) -> Prometheus:
    binary, log = program("prometheus"), folder / "prometheus.log"
    for _ in range(3):  # another process may take the free port before Prometheus does
        server = _launched(binary, folder, log)
        deadline = time.monotonic() + _READY_SECONDS
        while not server.has_ended() and time.monotonic() < deadline:
            if server.is_ready():
                return server
            time.sleep(0.05)
        _end(server._process)
        if "address already in use" not in log.read_text():
            break
    raise AssertionError(f"Prometheus did not get ready; its log:\n{log.read_text()}")


def _launched(binary: str, folder: Path, log: Path) -> Prometheus:
    address = f"127.0.0.1:{free_port()}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--web.enable-lifecycle",
                "--log.level=warn",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
    return Prometheus(f"http://{address}", process, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
