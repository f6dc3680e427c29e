"""The dashboard *Server*: what the server spends its time and memory on, and whether it could be restored."""

from grafana_foundation_sdk.models.dashboard import Dashboard, Panel

from ormo_dashboards import limits
from ormo_dashboards.board import Section, board
from ormo_dashboards.panels import CRITICAL, THIRD, WARNING, Query, Text, facts, lines, number
from ormo_dashboards.promql import increase, mean, quantile, rate, seconds_since, series
from ormo_dashboards.uids import SERVER

_STAGE = "{{stage}} {{instance}}"
_METHOD = "{{grpc_method}} {{instance}}"
# Streams stay open for hours; health watches too.
_SHORT_CALLS = 'grpc_type!="bidi_stream", grpc_method!="Watch"'
# One checkpoint a minute leaves nothing in a shorter window.
_CHECKPOINT_STEP = "5m"


def server() -> Dashboard:
    """Stages of an exchange, lock, traffic, gRPC, checkpoints and the process."""
    description = "Is the server the bottleneck, is it within its memory, and could it be restored?"
    sections = [
        Section("At a glance", [_up(), _lock_now(), _memory_now(), _unsaved_now(), _streams_now(), _version()]),
        Section("Where the time goes", [_stages(), _slow_stages(), _lock_held(), _lock_wait()]),
        Section("Traffic", [_bytes(), _pushes(), _pulls(), _refusals(), _streams()]),
        Section("gRPC", [_started(), _handled(), _latency(), _open_calls()]),
        Section("Checkpoints", [_unsaved(), _behind(), _duration(), _size(), _failures(), _upkeep()]),
        Section("Mirror", [_mirror(), _mirror_behind(), _mirror_failures()]),
        Section("Journal", [_journal_size(), _journal_writes()]),
        Section("Process", [_memory(), _cpu(), _files(), _restarts(), _build()]),
    ]
    return board(SERVER, "OrMo / Server", description, sections)


def _up() -> Panel:
    return number(
        Text(
            title="Up for",
            shows="Time since the server process started.",
            normal="As long as the run, or since its last restart.",
            bad="Short again and again: it crashes and is restarted; blue marks show when. See its log and Memory.",
        ),
        Query(seconds_since("process_start_time_seconds")),
        unit="s",
        decimals=1,
    )


def _lock_now() -> Panel:
    return number(
        Text(
            title="Lock held now",
            shows="Share of the time that the server's one lock is held.",
            normal="Below 50 %.",
            bad="Red: the alert's limit; the server is saturated and workers queue. See Where the time goes.",
        ),
        Query(rate("ormo_lock_held_seconds_total")),
        unit="percentunit",
        decimals=0,
        limits={limits.LOCK_HELD: CRITICAL},
    )


def _memory_now() -> Panel:
    return number(
        Text(
            title="Memory used",
            shows="Resident memory as a share of the limit (of the container, else of the machine).",
            normal="Flat once all workers have joined.",
            bad="Red: it is about to be killed. See Memory below.",
        ),
        Query(f"{series('process_resident_memory_bytes')} / on (job, instance) {series('ormo_memory_limit_bytes')}"),
        unit="percentunit",
        decimals=0,
        limits={limits.MEMORY_USED: CRITICAL},
    )


def _unsaved_now() -> Panel:
    return number(
        Text(
            title="Unsaved work now",
            shows="How much work a crash would cost now, in checkpoint intervals (from the shipped recording rules).",
            normal="Up to 1; nothing while all is saved.",
            bad="Orange: checkpoints fail or are late. Red: the alert's limit; see Checkpoints below.",
        ),
        Query(
            f"{series('instance:ormo_unsaved_work:seconds')} "
            f"/ on (job, instance) {series('ormo_checkpoint_interval_seconds')}"
        ),
        unit="count:intervals",
        decimals=1,
        limits={limits.UNSAVED_INTERVALS_AFTER_FAILURE: WARNING, limits.UNSAVED_INTERVALS: CRITICAL},
        no_value="all saved",
    )


def _streams_now() -> Panel:
    return number(
        Text(
            title="Worker streams",
            shows="Streams of workers that are open now, one for each slot.",
            normal="As many as slots.",
            bad="Fewer: workers are cut off, or push by single calls. 0: nobody trains.",
        ),
        Query(series("ormo_open_streams", 'kind="worker"')),
        unit="none",
    )


def _version() -> Panel:
    return number(
        Text(
            title="Version",
            shows="Version of the server.",
            normal="The one that was deployed; workers of the same protocol version go with it.",
            bad="Another one: the rollout did not happen.",
        ),
        Query(series("ormo_build_info"), "{{version}}"),
        unit="none",
        shows_name=True,
    )


def _stages() -> Panel:
    return lines(
        Text(
            title="Time per exchange, by stage",
            shows="Mean time of each stage of a push-pull exchange on the server, stacked.",
            normal="receive and send, the transfers, are most of it; lock, apply and copy stay thin.",
            bad="lock grows: the server is saturated. wait grows: the scheduler holds tickets back for the slowest "
            "worker. apply or copy grow: the machine's memory is busy with something else.",
        ),
        Query(mean("ormo_exchange_stage_seconds", "stage"), _STAGE),
        unit="s",
        stacked=True,
    )


def _slow_stages() -> Panel:
    return lines(
        Text(
            title="Slow exchanges, by stage (p99)",
            shows="The time that 99 % of the exchanges stay below, for each stage.",
            normal="A few times the mean.",
            bad="One stage apart from its mean: occasional stalls; receive and send of a slow link, apply and copy of "
            "a starved processor, lock of pulls and pushes that arrive together.",
        ),
        Query(quantile(0.99, "ormo_exchange_stage_seconds", "stage"), _STAGE),
        unit="s",
    )


def _lock_held() -> Panel:
    return lines(
        Text(
            title="Lock held",
            shows="Share of the time that the one lock is held: the load of the server; the red line is the alert's "
            "limit.",
            normal="Below 50 %, in proportion to updates per second and model size.",
            bad="Above the line more workers bring no more updates. Larger batches, fewer workers, or a machine with "
            "faster memory.",
        ),
        Query(rate("ormo_lock_held_seconds_total")),
        unit="percentunit",
        limits={limits.LOCK_HELD: CRITICAL},
    )


def _lock_wait() -> Panel:
    return lines(
        Text(
            title="Wait for the lock",
            shows="How long inputs of all kinds waited for the lock.",
            normal="p50 near 0; p99 about the time of applying one update.",
            bad="Several times that: a queue at the lock. See Lock held.",
        ),
        *(
            Query(quantile(share, "ormo_lock_wait_seconds"), f"{name} {{{{instance}}}}")
            for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99}.items()
        ),
        unit="s",
    )


def _bytes() -> Panel:
    return lines(
        Text(
            title="Tensor bytes",
            shows="Bytes of tensors received and sent per second, by method.",
            normal="Updates per second times the bytes of the model, each way.",
            bad="Flat at the speed of the network interface: the network is the bottleneck; bfloat16 on the wire "
            "halves it.",
        ),
        Query(rate("ormo_received_bytes_total", "method"), "received {{method}} {{instance}}"),
        Query(rate("ormo_sent_bytes_total", "method"), "sent {{method}} {{instance}}"),
        unit="binBps",
    )


def _pushes() -> Panel:
    return lines(
        Text(
            title="Pushes by outcome",
            shows="Updates per second that were applied, discarded as too late, repeated by a retry, or refused.",
            normal="All applied.",
            bad="repeated: connections break after the push. refused: see Refusals by reason. discarded: see "
            "Staleness.",
        ),
        Query(rate("ormo_pushes_total", "outcome"), "{{outcome}} {{instance}}"),
        unit="count:updates/s",
    )


def _pulls() -> Panel:
    return lines(
        Text(
            title="Pulls by outcome",
            shows="Parameters handed out per second: with a ticket, to readers, not sent as not newer, or refused.",
            normal="ticket follows the pushes; reader follows evaluators.",
            bad="Many more tickets than pushes: workers pull and lose what they compute. refused: see Refusals by "
            "reason.",
        ),
        Query(rate("ormo_pulls_total", "outcome"), "{{outcome}} {{instance}}"),
        unit="count:pulls/s",
        size=THIRD,
    )


def _refusals() -> Panel:
    happened = f"and on (job, instance, reason) ({series('ormo_refusals_total')} > 0)"
    return lines(
        Text(
            title="Refusals by reason",
            shows="Calls and updates refused within each step, by reason; only reasons that have occurred.",
            normal="None; NOT_A_MEMBER, TICKET_UNKNOWN and DRAINING for a moment after a restart or a lost lease.",
            bad="NON_FINITE: a worker diverges or computes in too low a precision. MANIFEST_DIGEST: a worker trains "
            "another model. TOO_MANY_WORKERS: raise --max-workers. UNKNOWN or INTERNAL: see the server's log.",
        ),
        Query(f"{increase('ormo_refusals_total', 'reason')} {happened}", "{{reason}} {{instance}}"),
        unit="none",
        size=THIRD,
        no_value="none since the start",
    )


def _streams() -> Panel:
    return lines(
        Text(
            title="Open streams",
            shows="Streams that are open, of workers and of readers.",
            normal="One for each slot of a worker; readers now and then.",
            bad="As many workers as --max-workers allows: raise it before the next one is refused. Sudden falls: "
            "connections break.",
        ),
        Query(series("ormo_open_streams"), "{{kind}} {{instance}}"),
        unit="none",
        size=THIRD,
    )


def _started() -> Panel:
    return lines(
        Text(
            title="Calls started, by method",
            shows="gRPC calls that began per second.",
            normal="Heartbeats and health checks. PushPull is one call per slot for hours, so it hardly shows.",
            bad="Many PushPull calls: streams break and are opened again. Many Join calls: workers restart in a loop.",
        ),
        Query(rate("grpc_server_started_total", "grpc_method"), _METHOD),
        unit="count:calls/s",
    )


def _handled() -> Panel:
    return lines(
        Text(
            title="Calls ended, by code",
            shows="gRPC calls that ended per second, by status code.",
            normal="OK; CANCELLED when workers leave.",
            bad="UNAVAILABLE: not ready or draining. FAILED_PRECONDITION and INVALID_ARGUMENT: see Refusals by reason. "
            "RESOURCE_EXHAUSTED: a limit is reached. UNKNOWN or INTERNAL: see the server's log.",
        ),
        Query(rate("grpc_server_handled_total", "grpc_code"), "{{grpc_code}} {{instance}}"),
        unit="count:calls/s",
    )


def _latency() -> Panel:
    return lines(
        Text(
            title="Time of short calls (p99)",
            shows="The time that 99 % of the calls of each method stay below; without streams that stay open.",
            normal="Milliseconds for heartbeats and health; transfers take as long as the network needs.",
            bad="Heartbeat or Check near a second: the server is starved of processor time, probes and leases will "
            "fail.",
        ),
        Query(quantile(0.99, "grpc_server_handling_seconds", "grpc_method", where=_SHORT_CALLS), _METHOD),
        unit="s",
    )


def _open_calls() -> Panel:
    by = ("grpc_method",)
    started = f"sum by (job, instance, {by[0]}) ({series('grpc_server_started_total')})"
    handled = f"sum by (job, instance, {by[0]}) ({series('grpc_server_handled_total')})"
    return lines(
        Text(
            title="Open calls",
            shows="Calls that have started and not ended, by method; each holds a thread of the server.",
            normal="PushPull: one for each slot; others near 0.",
            bad="Others pile up: the server does not keep up, or a client does not read its answer.",
        ),
        # A method of which no call has ended yet may have no `handled` series: then none has.
        Query(f"{started} - ({handled} or 0 * {started})", _METHOD),
        unit="none",
    )


def _unsaved() -> Panel:
    interval = series("ormo_checkpoint_interval_seconds")
    return lines(
        Text(
            title="Unsaved work",
            shows="Time since the last checkpoint, time of work that no checkpoint holds, and the alert's limit for "
            "it.",
            normal="A saw below the interval. Only the age grows while the iteration stands still: nothing is new "
            "then.",
            bad="Unsaved work near the limit: checkpoints fail (see Failed checkpoints) or take too long.",
        ),
        Query(seconds_since("ormo_checkpoint_last_success_timestamp_seconds"), "age {{instance}}"),
        Query(series("instance:ormo_unsaved_work:seconds"), "unsaved {{instance}}"),
        Query(f"{limits.UNSAVED_INTERVALS:g} * {interval}", "limit {{instance}}"),
        unit="s",
        size=THIRD,
        no_value="none yet",
    )


def _behind() -> Panel:
    return lines(
        Text(
            title="Iterations since the last checkpoint",
            shows="How many updates a crash would lose now.",
            normal="A saw: updates per second times the interval at most.",
            bad="It only grows: no checkpoint is written. Lower --checkpoint-seconds if a normal loss is too much.",
        ),
        Query(f"{series('ormo_iteration')} - {series('ormo_checkpoint_iteration')}"),
        unit="locale",
        size=THIRD,
        no_value="none yet",
    )


def _duration() -> Panel:
    return lines(
        Text(
            title="Time to write a checkpoint",
            shows="Mean time that a checkpoint took, copying and writing.",
            normal="Bytes of the state divided by the speed of the disk.",
            bad="Close to the interval: a slow or shared disk. Raise --checkpoint-seconds, or use another volume.",
        ),
        Query(mean("ormo_checkpoint_duration_seconds")),
        unit="s",
        size=THIRD,
        interval=_CHECKPOINT_STEP,
    )


def _size() -> Panel:
    return lines(
        Text(
            title="Size of the last checkpoint",
            shows="Bytes of the last checkpoint on disk.",
            normal="Parameters, momentum and what the method keeps; constant but for methods that keep vectors per "
            "slot.",
            bad="--checkpoints-kept + 1 of them do not fit on the volume: the next one fails.",
        ),
        Query(series("ormo_checkpoint_last_size_bytes")),
        unit="bytes",
        size=THIRD,
        no_value="none yet",
    )


def _failures() -> Panel:
    return lines(
        Text(
            title="Failed checkpoints",
            shows="Checkpoints that could not be written, within each step.",
            normal="0.",
            bad="Anything else: the log has the reason; mostly a full or read-only volume, or a model with non-finite "
            "values, which never replaces a good checkpoint.",
        ),
        Query(increase("ormo_checkpoint_failures_total")),
        unit="none",
        size=THIRD,
    )


def _upkeep() -> Panel:
    return lines(
        Text(
            title="Failed upkeep",
            shows="Background work that failed within each step, by kind.",
            normal="0.",
            bad="expiry: dead workers may stay members. checkpoints: see Failed checkpoints. trace: the trace has a "
            "gap.",
        ),
        Query(increase("ormo_upkeep_failures_total", "work"), "{{work}} {{instance}}"),
        unit="none",
        size=THIRD,
    )


def _mirror() -> Panel:
    copied = series("ormo_mirror_last_success_timestamp_seconds")
    return lines(
        Text(
            title="Checkpoints on the way to the mirror",
            shows="Time since the last copy, age of the oldest checkpoint that the mirror should have and has not, and "
            "the alert's limit for it. 0 without --mirror.",
            normal="A saw at most as high as the time between checkpoints and that of copying one.",
            bad="Missing near the limit: copies fail or are too slow. The log says why.",
        ),
        Query(f"time() - ({copied} > 0)", "age {{instance}}"),
        Query(series("ormo_mirror_behind_seconds"), "missing {{instance}}"),
        Query(
            f"{limits.MIRROR_BEHIND_SECONDS:g} "
            f"+ {limits.MIRROR_BEHIND_INTERVALS:g} * {series('ormo_checkpoint_interval_seconds')}",
            "limit {{instance}}",
        ),
        unit="s",
        size=THIRD,
    )


def _mirror_behind() -> Panel:
    return lines(
        Text(
            title="Iterations since the last copy",
            shows="How many updates would be lost now with the disk.",
            normal="A saw: updates per second times the interval and the time of copying.",
            bad="It only grows: nothing gets to the mirror.",
        ),
        Query(f"{series('ormo_iteration')} - ({series('ormo_mirror_iteration')} > 0)"),
        unit="locale",
        size=THIRD,
        no_value="no mirror",
    )


def _mirror_failures() -> Panel:
    return lines(
        Text(
            title="Failures of the mirror",
            shows="Copies, and renewals of the lease, that failed within each step.",
            normal="0.",
            bad="Anything else again and again: the bucket is away, denies access, or is another server's now.",
        ),
        Query(increase("ormo_mirror_failures_total")),
        unit="none",
        size=THIRD,
    )


def _journal_size() -> Panel:
    return lines(
        Text(
            title="Journal",
            shows="Bytes of the journal since the last checkpoint; 0 without --journal.",
            normal="It rises with the updates and falls with each checkpoint.",
            bad="It passes --journal-max-bytes and rises: checkpoints fail (see Failed checkpoints). At twice that "
            "updates are refused until one is written.",
        ),
        Query(series("ormo_journal_size_bytes")),
        unit="bytes",
    )


def _journal_writes() -> Panel:
    return lines(
        Text(
            title="Time to write the journal",
            shows="Mean time of a write of the journal with its fsync, which serves all workers that wait then. Empty "
            "without --journal.",
            normal="Some milliseconds, what the disk takes for an fsync.",
            bad="Tens of milliseconds or more: each exchange waits for it. Another disk, or --journal-fsync interval.",
        ),
        Query(mean("ormo_journal_commit_seconds")),
        unit="s",
    )


def _memory() -> Panel:
    return lines(
        Text(
            title="Memory",
            shows="Resident memory, the limit, and what the server said it needs (state, exchanges, checkpoint).",
            normal="Resident memory is somewhat above the need once all slots are in use, and flat then.",
            bad="Close to the limit: it is about to be killed. Fewer slots, a method that keeps less, or a higher "
            "limit. It climbs without end: report it.",
        ),
        Query(series("process_resident_memory_bytes"), "resident {{instance}}"),
        Query(f"sum by (job, instance) ({series('ormo_memory_need_bytes')})", "stated need {{instance}}"),
        Query(series("ormo_memory_limit_bytes"), "limit {{instance}}"),
        unit="bytes",
    )


def _cpu() -> Panel:
    return lines(
        Text(
            title="Processor",
            shows="Processor cores that the server uses.",
            normal="In proportion to updates per second.",
            bad="Flat at the container's limit: it is throttled, so every stage takes longer. Raise the limit.",
        ),
        Query(rate("process_cpu_seconds_total")),
        unit="count:cores",
    )


def _files() -> Panel:
    return lines(
        Text(
            title="Open files",
            shows="File descriptors that the server has open, sockets included, beside the most that it may have.",
            normal="A few per worker, far below the limit.",
            bad="Close to the limit: new connections and checkpoints will fail; raise it (ulimit -n).",
        ),
        Query(series("process_open_fds"), "open {{instance}}"),
        Query(series("process_max_fds"), "limit {{instance}}"),
        unit="none",
        size=THIRD,
        logarithmic=True,
    )


def _restarts() -> Panel:
    return lines(
        Text(
            title="Restarts",
            shows="How often the server was started again within the last half hour.",
            normal="0.",
            bad="At the red line an alert fires: it crashes again and again. The end of the log before the last start, "
            "and Memory, say why.",
        ),
        Query(f"changes({series('process_start_time_seconds')}[30m])"),
        unit="none",
        size=THIRD,
        limits={limits.RESTARTS: CRITICAL},
    )


def _build() -> Panel:
    return facts(
        Text(
            title="Build",
            shows="Versions of the server and of what it is built on.",
            normal="Those that were tested together.",
            bad="Another PyTorch than that of a checkpoint: replaying a trace may then differ in the last bits.",
        ),
        series("ormo_build_info"),
        labels={"instance": "run", "version": "version", "torch": "PyTorch", "grpc": "gRPC", "python": "Python"},
        size=THIRD,
    )
