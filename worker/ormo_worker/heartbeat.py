"""The thread that keeps a worker's lease, and notices when the server has fallen silent."""

import logging
import threading
from collections.abc import Callable

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.timeouts import FailureDetection
from ormo_worker.connection import Connection
from ormo_worker.errors import OrmoError
from ormo_worker.identity import Identity
from ormo_worker.refusal import CallEnded, replaced
from ormo_worker.session import Step

_LOG = logging.getLogger(__name__)


class Heartbeat:
    """Sends heartbeats from its own thread while the worker computes or waits.

    Args:
        connection: to the server.
        identity: of the worker.
        on_lost: called when the server no longer knows the worker.
        on_finished: called when the run is over.
    """

    def __init__(
        self,
        connection: Connection,
        identity: Identity,
        on_lost: Callable[[], None],
        on_finished: Callable[[pb.Iteration], None],
    ) -> None:
        self._connection = connection
        self._request = pb.HeartbeatRequest(worker=identity.worker, incarnation=identity.incarnation)
        self._on_lost = on_lost
        self._on_finished = on_finished
        self._lease_seconds = 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, lease_seconds: float) -> None:
        """Keep this lease from now on, with a new thread if there is none."""
        self._lease_seconds = lease_seconds
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ormo-heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread; its last call must not be in the way, so the connection is closed before."""
        self._stopped.set()
        # The garbage collector may close a client from any thread, this one included.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(FailureDetection(self._lease_seconds).heartbeat_seconds):
            try:
                self._beat()
            except OrmoError:  # closed, or stopped for a reason that the next exchange tells
                return

    def _beat(self) -> None:
        try:
            answer = self._connection.unary(
                self._connection.stub.heartbeat, self._request, FailureDetection(self._lease_seconds).heartbeat_seconds
            )
        except CallEnded as end:
            self._missed(end)
        else:
            if answer.finished:
                self._on_finished(answer.iteration)

    def _missed(self, end: CallEnded) -> None:
        _LOG.debug("a heartbeat failed: %s", end)
        if end.step is Step.JOIN:
            self._on_lost()
        elif end.step is Step.REPLACED:
            self._connection.stop_with(replaced(end.message))
        elif self._connection.silent_seconds >= self._lease_seconds:
            # Whoever waits for an answer would wait for ever if the network lost what was sent.
            self._connection.cancel_open()
