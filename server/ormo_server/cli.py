"""The command line: `ormo-server serve` and `ormo-server status`."""

import logging
import signal
import sys
import threading
from collections.abc import Sequence

import grpc
from pydantic import Field

from ormo_protos.settings import BAD_SETTINGS_EXIT_CODE, Settings, dispatch, load_settings
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.config import ServerSettings
from ormo_server.core.errors import OrmoError, SettingsError
from ormo_server.service.server import AddressInUseError, Server
from ormo_server.store import StoreError

log = logging.getLogger("ormo_server")

USAGE = """usage: ormo-server COMMAND [FLAGS]

commands:
  serve    hold a model's parameters and train them with what workers push
  status   show how a server is doing

`ormo-server COMMAND --help` lists the flags.
"""


class StatusSettings(Settings):
    """Show how a server is doing."""

    server: str = Field("127.0.0.1:50051", description="host and port of the server")
    timeout: float = Field(5.0, gt=0, description="seconds to wait for an answer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    commands = {
        "serve": lambda rest: serve(load_settings(ServerSettings, rest, program="ormo-server serve")),
        "status": lambda rest: show_status(load_settings(StatusSettings, rest, program="ormo-server status")),
    }
    return dispatch(sys.argv[1:] if argv is None else argv, commands, program="ormo-server", usage=USAGE)


def serve(settings: ServerSettings) -> int:
    """Serve until SIGTERM or SIGINT, or until the run ends if the settings say so.

    Returns:
        0 after a clean end; 1 if the server could not start, could not keep its state, or is broken; 2 for settings
        that can't be used together with what is on disk.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr
    )
    stop = _stop_signal()
    try:
        server = Server(settings)
        server.start()
    except (StoreError, AddressInUseError, OrmoError, SettingsError) as error:
        sys.stderr.write(f"ormo-server: {error}\n")
        return BAD_SETTINGS_EXIT_CODE if isinstance(error, SettingsError) else 1
    # One line that programs read: with port 0 nobody else knows where we are.
    sys.stdout.write(f"serving address={server.address} metrics={server.metrics_address}\n")
    sys.stdout.flush()
    log.info("serving on %s, metrics on %s", server.address, server.metrics_address or "no port")
    return _run_until_told(server, stop)


def _stop_signal() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _run_until_told(server: Server, stop: threading.Event) -> int:
    checkpointed_end = False
    while not stop.wait(0.1):
        if not server.host.has_model:
            continue
        engine = server.host.engine
        if engine.broken.is_set():
            log.critical("the state is broken (see the error above): stopping; a restart restores the last checkpoint")
            server.close()
            return 1
        if engine.finished.is_set() and not checkpointed_end:
            checkpointed_end = True
            server.host.checkpoint()
            log.info("the run is over at iteration %d", engine.position()[1])
        if checkpointed_end and server.settings.exit_when_finished and not _workers_left(server):
            break
    return 0 if server.drain() else 1


def _workers_left(server: Server) -> bool:
    """Whether workers have yet to learn that the run is over; silent ones lose their lease in time."""
    with server.host.engine.inspect() as machine:
        return bool(machine.state.members)


def show_status(settings: StatusSettings) -> int:
    """Print a server's status; returns 1 if it can't be reached."""
    with grpc.insecure_channel(settings.server) as channel:
        try:
            status = ParameterServerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=settings.timeout)
        except grpc.RpcError as error:
            sys.stderr.write(
                f"ormo-server status: no answer from {settings.server} ({error.details()}): is the server up, and is "
                "this its address?\n"
            )
            return 1
    sys.stdout.write(_described(status))
    return 0


def _described(status: pb.GetStatusResponse) -> str:
    phase = pb.GetStatusResponse.Phase.Name(status.phase).removeprefix("PHASE_").lower().replace("_", " ")
    lines = [
        f"{phase}: {status.method}, iteration {status.iteration.number}, {status.samples} samples, K "
        f"{status.bucket_size}, learning rate {status.learning_rate:g}",
        f"update rule {status.update_rule}, step scale {status.step_scale} (mean {status.step_scale_mean:.3g}), "
        f"scheduler {status.scheduler}",
        f"delay mean {status.delay_mean:.2f}, largest {status.delay_max}; {status.applied} gradients applied and "
        f"{status.discarded} discarded since the server started",
        f"last checkpoint {status.checkpoint_path or 'none'}",
    ]
    lines += [
        f"  {worker.worker}: {worker.applied} gradients since it joined, last delay {worker.last_delay}, "
        f"largest {worker.max_delay}, "
        f"{worker.compute_seconds:.3f} s a gradient"
        for worker in status.workers
    ]
    lines += [f"  refused {count} times: {reason}" for reason, count in sorted(status.refusals.items())]
    return "\n".join(lines) + "\n"
