"""The command `ormo-local`."""

import contextlib
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import Dialer, UnaryStub
from ormo_runtime.process import leave_if_asked, leave_on_signals, prepare_process
from ormo_runtime.settings import UsageError
from ormo_runtime.settings_loader import load_settings
from ormo_runtime.tracking import refuse_unusable_tracker
from ormo_worker.local.cluster import Cluster, ClusterError, LocalSettings, refuse_unusable_task
from ormo_worker.local.exported import bytes_moved
from ormo_worker.local.recorder import Recorder

_POLL_SECONDS = 0.25
_ANSWER_SECONDS = 2.0
_INTERRUPTED_EXIT_CODE = 130


@dataclass
class Progress:
    """What the live line and the summary show."""

    status: pb.GetStatusResponse = field(default_factory=pb.GetStatusResponse)
    evaluation: dict[str, float] = field(default_factory=dict)
    # Told by another thread, and not looked at yet.
    evaluations: "queue.SimpleQueue[dict[str, float]]" = field(default_factory=queue.SimpleQueue)
    started: float = field(default_factory=time.monotonic)
    first: tuple[float, int, int] | None = None
    metrics: str = ""

    def observe(self, status: pb.GetStatusResponse) -> None:
        """Take a newer status; the first one with a gradient starts the clock of the rates."""
        self.status = status
        if self.first is None and status.applied:
            self.first = (time.monotonic(), status.applied, status.samples)
        self.last = time.monotonic()

    def new_evaluations(self) -> Iterator[dict[str, float]]:
        """Those that came since the last look."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.evaluation = self.evaluations.get_nowait()
                yield self.evaluation

    def rates(self) -> tuple[float, float]:
        """Gradients and samples per second since the first gradient was seen."""
        if self.first is None or self.last <= self.first[0]:
            return 0.0, 0.0
        seconds = self.last - self.first[0]
        return (self.status.applied - self.first[1]) / seconds, (self.status.samples - self.first[2]) / seconds

    @property
    def pushed(self) -> str:
        """What the workers push, in a word."""
        return "pushes" if self.status.settings.local_steps else "gradients"

    def line(self) -> Text:
        """The live line."""
        status, (pushes, samples) = self.status, self.rates()
        end = f"/{status.settings.stop_after_gradients}" if status.settings.stop_after_gradients else ""
        loss = f"{status.loss:.4f}" if status.HasField("loss") else "-"
        accuracy = f"{self.evaluation['accuracy']:.1%}" if self.evaluation else "-"
        return Text(
            f"iteration {status.iteration.number}{end} · {pushes:.0f} {self.pushed}/s · {samples:.0f} samples/s · "
            f"loss {loss} · delay mean {status.delay_mean:.1f} max {status.delay_max} · accuracy {accuracy} · "
            f"{len(status.workers)} workers"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a local training; returns the exit code: 0, 1 for a failure, 130 for Ctrl-C."""
    prepare_process()
    settings = load_settings(LocalSettings, sys.argv[1:] if argv is None else argv, program="ormo-local")
    console = Console()
    leave_on_signals()
    try:
        if settings.track:
            refuse_unusable_tracker(settings.track)
        refuse_unusable_task(settings)
    except (ClusterError, UsageError) as error:
        _say_error(error, console)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED_EXIT_CODE
    return _train(settings, console)


def _train(settings: LocalSettings, console: Console) -> int:
    cluster, progress = Cluster(settings), Progress()
    recorder = Recorder(cluster, lambda said: console.print(Text(said, style="yellow"), soft_wrap=True))
    code = 0
    try:
        cluster.start(progress.evaluations.put)
        console.print(f"server on {cluster.address}, metrics on http://{cluster.metrics_address}/metrics")
        console.print(f"training {settings.task} by {settings.preset} with {settings.workers} workers", markup=False)
        _watch(cluster, progress, recorder, console)
    except (ClusterError, UsageError) as error:
        _say_error(error, console)
        code = 1
    except KeyboardInterrupt:
        code = _INTERRUPTED_EXIT_CODE
    finally:
        if not _stopped(cluster, console, asked=code == _INTERRUPTED_EXIT_CODE):
            code = _INTERRUPTED_EXIT_CODE
        _record(progress, recorder)
        recorder.close()
    _summarize(cluster, progress, recorder, console)
    return code


def _say_error(error: Exception, console: Console) -> None:
    console.print(Text(f"ormo-local: {error}", style="red"))


def _stopped(cluster: Cluster, console: Console, *, asked: bool) -> bool:
    """Stop all programs in order; at once if the user asks a second time. Returns whether it was in order."""
    said = "stopping: the server writes a checkpoint" if asked else ""
    while True:
        try:
            if said:
                console.print(said)
            cluster.stop()
        except KeyboardInterrupt:
            if asked:
                console.print("stopping at once: without a journal, everything since the last checkpoint is lost")
                cluster.kill()
                return False
            asked, said = True, "stopping; press Ctrl-C again to end everything at once, without a checkpoint"
        else:
            return True


def _record(progress: Progress, recorder: Recorder) -> None:
    for evaluation in progress.new_evaluations():
        recorder.evaluated(evaluation)


def _watch(cluster: Cluster, progress: Progress, recorder: Recorder, console: Console) -> None:
    with Dialer(cluster.address, None).dial() as channel, Live(console=console, refresh_per_second=4) as live:
        stub = UnaryStub(channel)
        reported: set[str] = set()
        while True:
            leave_if_asked()
            cluster.check()
            for worker in cluster.failed_workers():
                if worker.name not in reported:
                    reported.add(worker.name)
                    live.console.print(Text(f"{worker.name} ended with code {worker.ended()}: {worker.last_words(1)}"))
            with contextlib.suppress(grpc.RpcError):  # if the server has ended, the cluster knows
                status = stub.get_status(pb.GetStatusRequest(), wait_for_ready=True, timeout=_ANSWER_SECONDS)
                if isinstance(status, pb.GetStatusResponse):
                    progress.observe(status)
                    recorder.look(status)
                    _record(progress, recorder)
                    live.update(progress.line())
            if cluster.all_done():
                progress.metrics = cluster.metrics()
                return
            time.sleep(_POLL_SECONDS)


def _summarize(cluster: Cluster, progress: Progress, recorder: Recorder, console: Console) -> None:
    if not console.is_terminal:
        console.print()  # elsewhere the live line ends without a line feed
    status, (pushes, samples) = progress.status, progress.rates()
    rows = {
        progress.pushed: f"{status.iteration.number} in {time.monotonic() - progress.started:.1f} s "
        f"({pushes:.1f} {progress.pushed}/s, {samples:.0f} samples/s while training)",
        "delay": f"mean {status.delay_mean:.2f}, largest {status.delay_max}",
        "training loss": f"{status.loss:.4f}" if status.HasField("loss") else "not reported",
    }
    if progress.evaluation:
        rows["test loss"] = f"{progress.evaluation['loss']:.4f}"
        rows["test accuracy"] = f"{progress.evaluation['accuracy']:.2%}"
    moved = bytes_moved(progress.metrics)
    if moved is not None:
        rows["moved"] = f"{moved / 1e6:,.1f} MB of tensors between server and workers, both ways"
    server = cluster.server.peak_bytes if cluster.server else 0
    workers = max((worker.peak_bytes for worker in cluster.workers), default=0)
    rows["peak memory"] = f"server {server / 1e6:.0f} MB, largest worker {workers / 1e6:.0f} MB"
    if progress.evaluation:
        rows["pictures"] = recorder.summarize(status, progress.metrics)
    rows["logs"] = str(cluster.directory / "logs")
    rows["model"] = str(cluster.newest_checkpoint() or "no checkpoint")
    for name, value in rows.items():
        console.print(f"{name:>14}  {value}", highlight=False, markup=False, soft_wrap=True)
