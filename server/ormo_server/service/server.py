"""The gRPC server round a run: its threads, its port, its upkeep, and how it starts and ends."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ormo_protos.framing import Framing
from ormo_protos.limits import MAX_MESSAGE_BYTES
from ormo_protos.parsing import Parser
from ormo_runtime.timeouts import FailureDetection
from ormo_server.core.errors import NotReady
from ormo_server.metrics import Metrics
from ormo_server.metrics.process import serve_over_http
from ormo_server.security import (
    HEALTH,
    REFLECTION,
    SERVICE,
    Access,
    ListedAccess,
    OpenAccess,
    server_credentials,
)
from ormo_server.service.admin import Controls, phase_of
from ormo_server.service.health import Health
from ormo_server.service.interceptors import CallCounter, Guard, methods
from ormo_server.service.resources import calls_per_connection, most_connections, pool_of_threads, worker_streams
from ormo_server.service.run import RunHost
from ormo_server.service.servicer import Servicer
from ormo_server.service.streams import OpenCalls, StreamRegistry
from ormo_server.settings import ServerSettings

_LOG = logging.getLogger(__name__)

SERVICE_NAME: str = SERVICE.full_name

# Stays SERVING while the process works, also while it drains: a probe on it must not kill a busy server.
LIVENESS_NAME = "liveness"

# Besides the exchanges' and the checkpoint's time, what a stop may take; most of it is for a busy machine.
_STOP_SECONDS = 30.0
# A checkpoint at the end takes no longer but on a disk that hangs. A network's disk writes so much in a second.
_SLOW_DISK_BYTES = 10e6
# What the copy of the last checkpoint to a mirror may take besides, and to give the mirror back.
_MIRROR_SECONDS = 20.0
# gRPC tells at once, unless its serving thread is dead: then it never does.
_GRPC_STOP_SECONDS = 5.0
# How often the journal's size is looked at, and how long a full disk is left alone.
_RELIEF_SECONDS = 0.2
_FULL_SECONDS = 5.0


class AddressInUseError(OSError):
    """The port can't be had; the sentence says which and what to do."""


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    failures = FailureDetection(settings.failure_timeout_seconds)
    silence_ms = int(1000 * settings.failure_timeout_seconds)
    ping_ms, ping_timeout_ms = int(1000 * failures.ping_seconds), int(1000 * failures.ping_timeout_seconds)
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # gRPC's own estimate of the window grows to 16 MB and more for each stream that the server has no time for.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", int(settings.receive_window_bytes)),
        # By default a second server would share the port without an error.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", ping_ms),
        ("grpc.keepalive_timeout_ms", ping_timeout_ms),
        ("grpc.http2.ping_timeout_ms", ping_timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        # What waits in one connection is memory; a worker has a connection of its own.
        ("grpc.max_concurrent_streams", calls_per_connection(settings)),
        # Who connects and then says nothing, or has said it. Workers have a stream open, or send heartbeats.
        ("grpc.server_handshake_timeout_ms", silence_ms),
        ("grpc.max_connection_idle_ms", max(1000, silence_ms)),
        # Further ones are closed at once, whoever they are.
        ("grpc.max_allowed_incoming_connections", most_connections(settings)),
        # Workers may ping as often; the default would send them away for it.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", ping_ms // 2),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


class Server:
    """A run, served.

    Args:
        settings: of the server.

    Attributes:
        address: host and port it listens on, once started.
        metrics_address: the same for metrics; empty if none are served.
        told_to_stop: set when an operator has asked it to drain.
        stopping: set once it stops.
        stop_stage: what it is at then.

    Raises:
        TooFewResources: the system has not enough threads or descriptors for it.
        StoreError, SettingsError, MemoryLimit: see `RunHost`.
        CredentialsError, AccessError: certificates, or the list of callers, can't be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        # First what reads files only, so that a mistake there costs nothing.
        self._access: Access = OpenAccess() if settings.access is None else ListedAccess(settings.access)
        self._credentials = _credentials(settings)
        self._pool = pool_of_threads(settings)
        self.told_to_stop = threading.Event()
        self.metrics = Metrics(settings.worker_series)
        self.host = RunHost(settings, self.metrics)
        self.streams = StreamRegistry(worker_streams(settings), settings.max_readers)
        self._calls = OpenCalls()
        self.address = ""
        self.metrics_address = ""
        self.stopping = threading.Event()
        self.stop_stage = ""
        self._serving: list[threading.Thread] = []
        self._upkeep = self._repeating(
            "expiry", FailureDetection(settings.failure_timeout_seconds).check_seconds, self._expire
        )
        self._checkpoints = self._repeating("checkpoints", settings.checkpoint_seconds, self.host.checkpoint)
        self._relief = self._repeating("journal", _RELIEF_SECONDS, self._relieve_journal)
        self._health = Health()
        self._grpc = self._grpc_server()
        self._export()

    def _export(self) -> None:
        self.metrics.run.watch(
            lambda: self.host.engine.view() if self.host.has_model else None,
            lambda: phase_of(self.host, draining=self.streams.draining),
        )
        self.metrics.streams.count("worker", lambda: self.streams.count(reader=False))
        self.metrics.streams.count("reader", lambda: self.streams.count(reader=True))
        self.metrics.calls.expect(methods(SERVICE))

    def _grpc_server(self) -> grpc.Server:
        servicer = Servicer(self.host, self.streams, self._access, Controls(self.host, self.told_to_stop))
        interceptors = [
            CallCounter(self.metrics.calls, (SERVICE, HEALTH, REFLECTION)),
            Guard(self._access, servicer, self._calls),
        ]
        server = grpc.server(self._pool, interceptors=interceptors, options=_options(self.settings))
        server.add_generic_rpc_handlers((handlers(servicer),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.settings.reflection:
            names = (SERVICE_NAME, HEALTH.full_name, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def start(self) -> None:
        """Listen, and begin upkeep.

        Raises:
            AddressInUseError: a port can't be had.
        """
        self.address = self._bind()
        self._serve_metrics()
        for name in ("", SERVICE_NAME, LIVENESS_NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._upkeep.start()
        self._checkpoints.start()
        if self.settings.journal:
            self._relief.start()
        if self.host.files.mirror is not None:
            self.host.files.mirror.start(lambda: self.host.engine.iteration()[1] if self.host.has_model else None)
        before = threading.enumerate()
        self._grpc.start()
        self._serving = [each for each in threading.enumerate() if each not in before and "_serve" in each.name]

    @property
    def serving(self) -> bool:
        """Whether gRPC's one thread lives that hands calls to ours; without it nobody is answered any more."""
        return all(thread.is_alive() for thread in self._serving)

    def _bind(self) -> str:
        host = self.settings.listen.rpartition(":")[0]
        try:
            if self._credentials is None:
                port = self._grpc.add_insecure_port(self.settings.listen)
            else:
                port = self._grpc.add_secure_port(self.settings.listen, self._credentials)
        except RuntimeError as error:
            raise AddressInUseError(
                f"can't listen on {self.settings.listen}: the port is in use or the address is not this machine's; "
                "stop the other program or choose another --listen"
            ) from error
        return f"{host}:{port}"

    def _serve_metrics(self) -> None:
        if not self.settings.metrics_listen:
            return
        host, _, port = self.settings.metrics_listen.rpartition(":")
        try:
            server = serve_over_http(
                host,
                int(port),
                self.metrics.registry,
                alive=lambda: self.serving or self.stopping.is_set(),
                ready=self._is_ready,
            )
        except (OSError, OverflowError) as error:
            raise AddressInUseError(
                f"can't serve metrics on {self.settings.metrics_listen}: {error}; choose another --metrics-listen, or "
                "an empty one for none"
            ) from error
        self._metrics_server = server
        self.metrics_address = f"{host}:{server.server_port}"

    def _is_ready(self) -> bool:
        broken = self.host.has_model and self.host.engine.broken.is_set()
        return not (broken or self.stopping.is_set())

    # While it runs

    def _repeating(self, work: str, seconds: float, act: Callable[[], object]) -> threading.Thread:
        def repeat() -> None:
            while not self.stopping.wait(seconds):
                try:
                    act()
                except Exception:  # noqa: BLE001 - without this work leases never end, or nothing is kept: it must go on
                    if not self.stopping.is_set():
                        _LOG.exception("%s failed; it is tried again in %g s", work, seconds)
                        self.metrics.upkeep.failures.labels(work).inc()

        return threading.Thread(target=repeat, name=work, daemon=True)

    def _expire(self) -> None:
        self.metrics.settle()
        for calls in (self.streams, self._calls):
            calls.end_silent(self.settings.failure_timeout_seconds)
            calls.end_unknown(self._access)
        if self.host.has_model and not self.host.engine.broken.is_set():
            with contextlib.suppress(NotReady):  # has said so, and ends it all
                self.host.files.refuse_if_not_ours()
                for worker, incarnation in self.host.engine.expire():
                    self.streams.end_worker(worker, incarnation)

    def _relieve_journal(self) -> None:
        if not self.host.relieve_journal():
            self.stopping.wait(_FULL_SECONDS)

    # At the end

    @property
    def stop_seconds(self) -> float:
        """How long a stop may take, whatever it waits for."""
        mirror_seconds = 0.0 if self.settings.mirror is None else self._mirror_seconds
        return self.settings.drain_seconds + _STOP_SECONDS + self._disk_seconds + mirror_seconds

    @property
    def _disk_seconds(self) -> float:
        return self.host.checkpoint_bytes / _SLOW_DISK_BYTES

    @property
    def _mirror_seconds(self) -> float:
        return _MIRROR_SECONDS + self._disk_seconds

    def drain(self) -> bool:
        """Stop without losing anything: let exchanges end, checkpoint, close.

        Returns:
            Whether the state is on disk.
        """
        self._stop_serving("the end of exchanges")
        _LOG.info("draining: %d streams are open", len(self.streams))
        if not self.streams.drain(self.settings.drain_seconds):
            _LOG.warning("exchanges were cut off after %g s; their workers will retry", self.settings.drain_seconds)
        if self.host.has_model:
            self.host.engine.close()
        self._stop("the last checkpoint")
        kept = self.host.checkpoint(drained=True)
        self._end_calls()
        if not kept:  # without connections there may be descriptors and memory for it
            self._stop("the last checkpoint")
            kept = self.host.checkpoint(drained=True)
        if self.host.files.mirror is not None:
            self._stop("the copy of the last checkpoint in the mirror")
            self.host.files.mirror.finish(self._mirror_seconds)
        self.close()
        return kept

    def close(self) -> None:
        """Stop at once, keeping nothing that is not on disk already."""
        self._stop_serving("the end of calls")
        self._end_calls()
        self._stop("the end of the journal and the trace")
        self.host.close()
        if self.metrics_address:
            self._stop("the end of the metrics port")
            self._metrics_server.close()
        self._stop("the end of the process")

    def _stop(self, stage: str) -> None:
        self.stop_stage = stage
        self.stopping.set()

    def _stop_serving(self, stage: str) -> None:
        self._stop(stage)
        for name in ("", SERVICE_NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)

    def _end_calls(self) -> None:
        self._stop("the end of calls")
        with contextlib.suppress(RuntimeError):  # no thread can be started for it: calls end with the process
            self._grpc.stop(grace=0).wait(_GRPC_STOP_SECONDS)
        self._health.close()
        self._pool.shutdown(wait=False)


def handlers(servicer: Servicer) -> grpc.GenericRpcHandler:
    """The table of the contract's methods. Generated code would copy tensors through protobuf objects."""
    return grpc.method_handlers_generic_handler(
        SERVICE.full_name, {method.name: _handler(method, getattr(servicer, method.name)) for method in SERVICE.methods}
    )


def _handler(method: MethodDescriptor, behaviour: Callable[..., Any]) -> "grpc.RpcMethodHandler[Any, Any]":
    words = {True: "stream", False: "unary"}
    make = getattr(grpc, f"{words[method.client_streaming]}_{words[method.server_streaming]}_rpc_method_handler")
    decode = _reader(method.input_type)

    # Not as a deserializer: gRPC has one thread for these and all news of calls, and a large message would hold it.
    @functools.wraps(behaviour)
    def decoded(request: Any, context: grpc.ServicerContext) -> Any:
        return behaviour(map(decode, request) if method.client_streaming else decode(request), context)

    handler: grpc.RpcMethodHandler[Any, Any] = make(decoded, response_serializer=_writer(method.output_type))
    return handler


def _reader(kind: Descriptor) -> Callable[[bytes], Any]:
    made = GetMessageClass(kind)
    return Framing(made).decode if "chunk" in kind.fields_by_name else Parser(made).parse


def _writer(kind: Descriptor) -> Callable[[Any], bytes]:
    made = GetMessageClass(kind)
    return Framing(made).encode if "chunk" in kind.fields_by_name else made.SerializeToString
