"""The run as a whole: a server, workers, a line now and then, and the end in order."""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import Dialer, UnaryStub
from ormo_runtime.process import leave_if_asked, leave_on_signals
from ormo_runtime.settings_loader import BAD_SETTINGS_EXIT_CODE
from ormo_worker.integrations.ray.fleet import Fleet, outcome
from ormo_worker.integrations.ray.program import Ended, Program, Wanted
from ormo_worker.integrations.ray.settings import RaySettings, ScaleSettings

_LOG = logging.getLogger(__name__)
NAMESPACE = "ormo"
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 2.0
_CONNECT_SECONDS = 10.0
_LINE_SECONDS = 10.0
# A server that comes back is to be seen soon; gRPC would wait for up to two minutes.
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 250), ("grpc.max_reconnect_backoff_ms", 1000)]
_AGAIN_SECONDS = 5.0  # between two starts of a server: what made it end may last a while, such as a full disk


class RunFailed(Exception):
    """The run can't go on, or never began; the text says why.

    Attributes:
        code: to exit with.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def connected(address: str, working_dir: Any = None) -> Iterator[None]:
    """With the cluster at this address.

    Raises:
        RunFailed: there is none.
    """
    environment = {} if working_dir is None else {"runtime_env": {"working_dir": str(working_dir)}}
    try:
        if ":" in address:  # Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING, **environment)
    except (OSError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise RunFailed(
            f"no Ray cluster at --address {address} ({said}): start one with `ray start --head`, or give --address "
            "local for one on this machine"
        ) from None
    leave_on_signals()  # Ray has set its own
    try:
        yield
    finally:
        ray.shutdown()


def on_this_node() -> dict[str, Any]:
    """Options of an actor that stays on the node that this program is on, and takes nothing from the workers."""
    here = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }


class OwnServer:
    """A server as an actor on this node, started again whenever it fails.

    Args:
        settings: of the run.

    Attributes:
        address: HOST:PORT of it.
        served: whether it was ever heard of.
    """

    def __init__(self, settings: RaySettings) -> None:
        host = "127.0.0.1" if settings.address == "local" else ray.util.get_node_ip_address()
        self.address = f"{host}:{settings.server_port}"
        self.directory = settings.directory_of_server()
        self.served = False
        self._again_at = 0.0
        self._actor: Any = (
            ray.remote(Program)
            .options(max_concurrency=3, **on_this_node())
            .remote("server", "ormo_server", settings.server_words(self.address, self.directory))
        )
        self.ended: Any = self._actor.run.remote()

    def look(self, ended: set[Any]) -> None:
        """See how it goes; start it again if need be.

        Raises:
            RunFailed: it never served, or its settings can't be used.
        """
        if self.ended is None and time.monotonic() >= self._again_at:
            self.ended = self._actor.run.remote()
        elif self.ended in ended:
            how, self.ended = outcome(self.ended), None
            if not self.served or how.code == BAD_SETTINGS_EXIT_CODE:
                raise RunFailed(f"the server did not start: {how.last_words}", how.code or 1)
            _LOG.error(
                "the server ended with code %d and is started again in %g s; workers wait: %s",
                *(how.code, _AGAIN_SECONDS, how.last_words),
            )
            self._again_at = time.monotonic() + _AGAIN_SECONDS

    def stop(self) -> Ended:
        """Have it write a checkpoint and end."""
        if self.ended is None:
            return Ended(0)
        self._actor.stop.remote()
        while not ray.wait([self.ended], timeout=_LOOK_SECONDS)[0]:
            leave_if_asked()
        return outcome(self.ended)

    def kill(self) -> None:
        """End it at once."""
        ray.kill(self._actor)


class Run:
    """One run, from its start to its end.

    Args:
        settings: of it.

    Raises:
        RunFailed: the cluster has one of that name already.
    """

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        try:
            self._wanted: Any = (
                ray.remote(Wanted).options(name=settings.name, **on_this_node()).remote(settings.workers)
            )
        except ValueError:
            raise RunFailed(
                f"the cluster has a run named {settings.name!r}: give this one another --name and --server-port, or "
                f"change that one with `ormo-ray scale --name {settings.name}`",
                BAD_SETTINGS_EXIT_CODE,
            ) from None
        self._server = OwnServer(settings) if settings.server is None else None
        self.address = self._server.address if self._server else str(settings.server)
        self._fleet = Fleet(settings, self.address)
        self._stub = UnaryStub(Dialer(self.address, settings.credentials(), _OPTIONS).dial())
        self._status = pb.GetStatusResponse()
        self._line = (0.0, 0, 0)

    def train(self) -> None:
        """Until the run is over, or nobody is left who trains.

        Raises:
            RunFailed: all workers failed, or the server can't be had.
            KeyboardInterrupt: SIGINT or SIGTERM came.
        """
        while True:
            leave_if_asked()
            self._ask()
            ended = self._wait()
            if self._server is not None:
                self._server.look(ended)
                if not self._server.served:
                    continue  # workers would wait for it, and not as long
            self._fleet.look(ended)
            if self._fleet.over and self._fleet.done | self._fleet.failed.keys():
                return self._conclude()
            self._fleet.resize(ray.get(self._wanted.workers.remote()))

    def _wait(self) -> set[Any]:
        promises = [promise for worker in self._fleet.workers.values() for promise in (worker.ended, worker.where)]
        if self._server is not None and self._server.ended is not None:
            promises.append(self._server.ended)
        if not promises:
            time.sleep(_LOOK_SECONDS)
            return set()
        # Workers answer where they are at once, so what is waited for is that time is over.
        first, _ = ray.wait(promises, num_returns=len(promises), timeout=_LOOK_SECONDS)
        return set(first)

    def _ask(self) -> None:
        """Ask the server how it goes; one that does not say is waited for, or has its reasons."""
        with suppress(grpc.RpcError):
            status = self._stub.get_status(pb.GetStatusRequest(), timeout=_ANSWER_SECONDS)
            if isinstance(status, pb.GetStatusResponse):
                if self._server is not None and not self._server.served:
                    self._server.served = True
                    _LOG.info("the server is at %s, and writes into %s", self.address, self._server.directory)
                self._status = status
                self._show()

    def _show(self) -> None:
        status, (shown_at, members, iteration) = self._status, self._line
        now, number = time.monotonic(), status.iteration.number
        if len(status.workers) == members and (now - shown_at < _LINE_SECONDS or number == iteration):
            return
        rate = (number - iteration) / (now - shown_at) if shown_at else 0.0
        loss = f", loss {status.loss:.4f}" if status.HasField("loss") else ""
        _LOG.info(
            "iteration %d, %.1f gradients a second%s; %d workers, K is %d",
            *(number, rate, loss, len(status.workers), status.bucket_size),
        )
        self._line = (now, len(status.workers), number)

    def _conclude(self) -> None:
        fleet = self._fleet
        if not fleet.done:
            last = list(fleet.failed.values())[-1]
            raise RunFailed(f"all workers failed; the last one with code {last.code}: {last.last_words}", last.code)
        if fleet.failed:
            _LOG.warning("%d of %d workers had failed", len(fleet.failed), len(fleet.failed) + len(fleet.done))

    def stop(self) -> None:
        """End workers, then the server, in order.

        Raises:
            RunFailed: the server's state may not be whole.
            KeyboardInterrupt: another signal came.
        """
        for worker in list(self._fleet.workers.values()):
            self._fleet.dismiss(worker)
        while self._fleet.workers:
            leave_if_asked()
            self._fleet.look(self._wait())
        self._ask()
        if self._server is not None:
            how = self._server.stop()
            if how.code:
                raise RunFailed(f"the server ended with code {how.code}: {how.last_words}")

    def kill(self) -> None:
        """End all at once."""
        self._fleet.kill()
        if self._server is not None:
            self._server.kill()

    def last_words(self) -> str:
        """What came of it."""
        over = self._status.phase == pb.GetStatusResponse.PHASE_FINISHED
        state = "the run is over" if over else "the run stands"
        number = self._status.iteration.number
        model = f"; its model is in {self._server.directory / 'latest'}" if self._server is not None else ""
        return f"{state} at iteration {number}{model}"


def scale(settings: ScaleSettings) -> str:
    """Change the number of workers; returns a sentence of what was done.

    Raises:
        RunFailed: there is no such cluster or run.
    """
    with connected(settings.address):
        try:
            wanted: Any = ray.get_actor(settings.name)
        except ValueError:
            raise RunFailed(
                f"the cluster has no run named {settings.name!r}: give --name as the run was started with"
            ) from None
        before = ray.get(wanted.change.remote(settings.workers))
        return f"{settings.workers} workers are wanted now, and were {before} before"
