"""What becomes of a local run's statuses and evaluations: rows for its table and for the user's tracker."""

from collections.abc import Callable

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tracking import Setting, Tracker, Tracking
from ormo_worker.figures import RunRows, settings_of
from ormo_worker.local.cluster import Cluster
from ormo_worker.local.exported import delays_of
from ormo_worker.local.results import Evaluations, draw, write_summary

_NOT_SHOWN = {"directory", "metrics_listen", "track"}


class Recorder:
    """Begins with the first status.

    Args:
        cluster: whose run it is.
        tell: what sentences go to.
    """

    def __init__(self, cluster: Cluster, tell: Callable[[str], object]) -> None:
        self._directory = cluster.directory
        given = cluster.settings.model_dump(mode="json", exclude=_NOT_SHOWN)
        self._settings: dict[str, Setting] = given | {"method": cluster.settings.preset}
        self._track = cluster.settings.track
        self._tell = tell
        self._trackers: list[Tracker] = []
        self._rows: RunRows | None = None

    def look(self, status: pb.GetStatusResponse) -> None:
        """Take a newer status.

        Raises:
            UsageError: the first one, and the tracker could not be made.
        """
        if self._rows is None:
            self._rows = self._begun(status)
        self._rows.look(status)

    def _begun(self, status: pb.GetStatusResponse) -> RunRows:
        if self._track:
            settings = self._settings | settings_of(status)
            self._trackers.append(Tracking(self._track, settings, self._tell))
        # What a server has not applied itself it has restored.
        restored = status.iteration.number > status.applied
        self._trackers.append(Evaluations(self._directory, continues=restored, tell=self._tell))
        return RunRows(self._trackers)

    def evaluated(self, told: dict[str, float]) -> None:
        """Take an evaluation, as the evaluator prints it."""
        if self._rows is not None:
            iteration, samples = int(told["iteration"]), int(told["samples"])
            self._rows.evaluated(iteration, samples, told["loss"], told["accuracy"], seconds_ago=told["seconds"])

    def close(self) -> None:
        """Let the trackers write what is left."""
        while self._trackers:
            self._trackers.pop().close()

    def summarize(self, status: pb.GetStatusResponse, metrics: str) -> str:
        """Write the summary and have the pictures drawn; says where they are, or why there are none."""
        try:
            write_summary(self._directory, self._settings, status, delays_of(metrics))
        except OSError as error:
            return f"none: {error}"
        return draw(self._directory)
