"""The dashboard *Staleness*: how late updates are, and whose."""

from grafana_foundation_sdk.models.dashboard import Dashboard, Panel

from ormo_dashboards import limits
from ormo_dashboards.board import Section, board
from ormo_dashboards.panels import (
    CRITICAL,
    THIRD,
    WARNING,
    Column,
    Query,
    Text,
    distribution,
    lines,
    rows,
)
from ormo_dashboards.promql import (
    at_workers_of_the_run,
    buckets,
    increase,
    mean,
    per_run,
    quantile,
    rate,
    series,
    share,
)
from ormo_dashboards.uids import STALENESS

_WORKER = "{{worker}} @ {{instance}}"
_NEEDS_EXPORTER = "Needs --metrics-listen on the workers, and a Prometheus that reaches them."


def staleness() -> Dashboard:
    """Delays over all and per worker, who is slow, tickets, and what workers measure themselves."""
    description = "How late are updates, and whose? Delay counts the updates applied since the parameters went out."
    sections = [
        Section("How late are updates?", [_delays(), _delay(), _relative(), _seconds(), _lag()]),
        Section("Who is slow?", [_slowest(), _last(), _smoothed(), _largest(), _ticket_time(), _pace(), _compute()]),
        Section("Tickets and membership", [_tickets(), _members(), _expired(), _bounds(), _not_applied()]),
        Section(
            "Inside the workers (needs --metrics-listen on workers)",
            [_steps(), _outcomes(), _retries(), _gpu()],
            collapsed=True,
        ),
    ]
    return board(STALENESS, "OrMo / Staleness", description, sections)


def _quantiles(histogram: str) -> list[Query]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return [Query(quantile(share, histogram), f"{name} {{{{instance}}}}") for name, share in shares.items()]


def _delays() -> Panel:
    return distribution(
        Text(
            title="Delay",
            shows="Delay of the updates in iterations, as a heatmap over all workers.",
            normal="One band near K − 1 when workers are equal; a second one n times higher for workers n times "
            "slower.",
            bad="A band that climbs: some workers get slower and slower. Find them under Who is slow.",
        ),
        buckets("ormo_gradient_delay_iterations"),
        unit="none",
    )


def _delay() -> Panel:
    return lines(
        Text(
            title="Delay, quantiles",
            shows="The delay that 50, 90 and 99 % of the updates stay below.",
            normal="Steady; the median is about K − 1 with the asynchronous scheduler, and 0 with the synchronous one.",
            bad="p99 far above the median: few workers are slow. All rise: many workers joined, or pushes queue up.",
        ),
        *_quantiles("ormo_gradient_delay_iterations"),
        unit="none",
    )


def _relative() -> Panel:
    return lines(
        Text(
            title="Delay divided by K",
            shows="Delay as a multiple of K, so that runs of any size compare; the red line is the alert's limit.",
            normal="Median about 1; p99 about n where a worker is n times slower than the rest.",
            bad="p99 above the red line: those updates say little about the present model. Leave the slow workers "
            "out, give them smaller batches, or take ormo-da or --discard-delay.",
        ),
        *_quantiles("ormo_gradient_relative_delay"),
        unit="none",
        limits={limits.RELATIVE_DELAY: CRITICAL},
        size=THIRD,
    )


def _seconds() -> Panel:
    return lines(
        Text(
            title="Staleness in seconds",
            shows="Time from handing out parameters to counting the update that was computed at them.",
            normal="The time of one step of the worker, transfers included.",
            bad="It rises while Compute share stays high: slow hardware. It rises while the share falls: slow network, "
            "or a server that is busy; see Where the time goes on Server.",
        ),
        *_quantiles("ormo_gradient_staleness_seconds"),
        unit="s",
        size=THIRD,
    )


def _lag() -> Panel:
    return lines(
        Text(
            title="Bucket lag",
            shows="How many buckets behind the newest one updates were filed.",
            normal="0 and 1; about n for a worker n times slower.",
            bad="High: ordered momentum gives such an update the weight β^lag in the momentum, so it hardly counts "
            "there.",
        ),
        *_quantiles("ormo_gradient_lag_buckets"),
        unit="none",
        size=THIRD,
    )


def _slowest() -> Panel:
    key = ("worker",)
    return rows(
        Text(
            title="Who is slow",
            shows="Each worker's pace, time per update, share of time spent computing, delay and silence; slowest "
            "first.",
            normal="Workers of one kind differ little. Silent for seconds at most: heartbeats come all the time.",
            bad="Few updates per second with a high compute share: slow hardware or big batches. With a low one: "
            "slow network, or it waits for tickets. Last push in orange though it is not silent: its device or its "
            "data loading hangs; an alert fires if that is ten times its usual time. Restart it. No pace but a recent "
            "push: its updates come so late that the method discards them. No compute share: no push within a minute.",
        ),
        Column(heading="updates/s", expression=rate("ormo_worker_gradients_total", *key), unit="none"),
        Column(heading="ticket to push", expression=_newest("ormo_worker_ticket_seconds"), unit="s"),
        Column(heading="compute share", expression=_compute_share(), unit="percentunit"),
        Column(heading="smoothed delay", expression=_newest("ormo_worker_smoothed_delay_iterations"), unit="none"),
        Column(heading="largest delay", expression=_newest("ormo_worker_max_delay_iterations"), unit="none"),
        Column(
            heading="silent for",
            expression=f"time() - {_newest('ormo_worker_last_heard_timestamp_seconds')}",
            unit="s",
        ),
        Column(
            heading="last push",
            expression=f"time() - {_newest('ormo_worker_last_push_timestamp_seconds')}",
            unit="s",
            limits={limits.LAST_PUSH_SECONDS: WARNING},
        ),
        labels={"worker": "worker", "instance": "run"},
        sort_by="updates/s",
    )


def _compute_share() -> str:
    return share("ormo_worker_compute_seconds_total", "ormo_worker_training_seconds_total", "worker")


def _newest(gauge: str) -> str:
    return per_run(series(gauge), "worker", aggregation="max")


def _last() -> Panel:
    return lines(
        Text(
            title="Last delay per worker",
            shows="Delay of the last update of each worker.",
            normal="Jitter around K − 1, higher for slower workers.",
            bad="One line far above: that worker is slow. A line that stays flat: it pushes nothing any more.",
        ),
        Query(series("ormo_worker_last_delay_iterations"), _WORKER),
        unit="none",
        size=THIRD,
    )


def _smoothed() -> Panel:
    return lines(
        Text(
            title="Smoothed delay per worker",
            shows="Running mean of each worker's delay.",
            normal="Flat lines, one level for each kind of machine.",
            bad="A line that climbs: that worker loses pace against the others.",
        ),
        Query(series("ormo_worker_smoothed_delay_iterations"), _WORKER),
        unit="none",
        size=THIRD,
    )


def _largest() -> Panel:
    return lines(
        Text(
            title="Largest delay per worker",
            shows="The largest delay that an update of each worker has had since it joined.",
            normal="A few times K, reached early.",
            bad="A jump: that worker stood still for a while and came back with an old update. Its log says why.",
        ),
        Query(series("ormo_worker_max_delay_iterations"), _WORKER),
        unit="none",
        size=THIRD,
    )


def _ticket_time() -> Panel:
    return lines(
        Text(
            title="Ticket to push per worker",
            shows="How long each worker took from its last ticket to the push that used it.",
            normal="Steady: one step of that worker, transfers included.",
            bad="It grows for one worker: throttled, shared or swapping hardware, or a slow link. For all: the server "
            "is busy.",
        ),
        Query(series("ormo_worker_ticket_seconds"), _WORKER),
        unit="s",
        size=THIRD,
    )


def _pace() -> Panel:
    return lines(
        Text(
            title="Samples per second and worker",
            shows="Training samples per second of each worker.",
            normal="Flat lines, one level for each kind of machine.",
            bad="A line that falls: see that worker's host. A line that ended: it left, or its lease ran out.",
        ),
        Query(rate("ormo_worker_samples_total", "worker"), _WORKER),
        unit="count:samples/s",
        size=THIRD,
    )


def _compute() -> Panel:
    return lines(
        Text(
            title="Compute share per worker",
            shows="Share of the time between its updates that each worker spent computing them; at most 100 %, for "
            "each slot where several compute at once.",
            normal="Above 80 %: the hardware is used.",
            bad="Low: the worker waits for transfers or tickets. "
            "Larger batches, bfloat16 on the wire or a second slot help. It never includes loading data if the loop "
            "does that outside the step.",
        ),
        Query(_compute_share(), _WORKER),
        unit="percentunit",
        size=THIRD,
        bridged=True,
    )


def _tickets() -> Panel:
    return lines(
        Text(
            title="Tickets",
            shows="Tickets in flight, slots of live workers, and slots that wait for a ticket.",
            normal="As many tickets as slots, and nobody waits, with the asynchronous scheduler.",
            bad="Slots wait for long: the round or the staleness bound is held up by the slowest worker. Fewer tickets "
            "than slots and nobody waits: workers joined and then ask for nothing.",
        ),
        Query(series("ormo_tickets_in_flight"), "in flight {{instance}}"),
        Query(series("ormo_live_slots"), "slots {{instance}}"),
        Query(series("ormo_slots_waiting"), "waiting {{instance}}"),
        unit="none",
        size=THIRD,
    )


def _members() -> Panel:
    return lines(
        Text(
            title="Workers",
            shows="Live workers, those of them that have no metrics of their own, and joins within each step.",
            normal="All workers live. Joins only at the start, and when spot machines come back.",
            bad="Joins all the time: a worker crashes and starts again, see its log. Workers without series: raise "
            "--worker-series to see them here.",
        ),
        Query(series("ormo_live_workers"), "live {{instance}}"),
        Query(series("ormo_workers_without_series"), "without series {{instance}}"),
        Query(increase("ormo_joins_total"), "joins {{instance}}"),
        unit="none",
        size=THIRD,
    )


def _expired() -> Panel:
    return lines(
        Text(
            title="Expired",
            shows="Tickets that were out too long, and workers whose lease ran out, within each step.",
            normal="0; with spot machines a worker now and then.",
            bad="Tickets expire: a worker lives but returns nothing, such as a hung GPU; restart it. Workers expire: "
            "they died or were cut off for --failure-timeout-seconds.",
        ),
        Query(increase("ormo_expired_tickets_total"), "tickets {{instance}}"),
        Query(increase("ormo_expired_workers_total"), "workers {{instance}}"),
        unit="none",
        size=THIRD,
    )


def _bounds() -> Panel:
    return lines(
        Text(
            title="Limits of the method",
            shows="The staleness bound and the delay from which on updates are discarded, beside the p99 delay.",
            normal="The delay stays below the lines; most methods have neither.",
            bad="The delay touches the bound: workers wait for the slowest one. It is above the discard limit: their "
            "work is thrown away; see Pushes not applied.",
        ),
        Query(quantile(0.99, "ormo_gradient_delay_iterations"), "p99 delay {{instance}}"),
        Query(series("ormo_staleness_bound_iterations"), "bound {{instance}}"),
        Query(series("ormo_discard_limit_iterations"), "discarded from {{instance}}"),
        unit="none",
    )


def _not_applied() -> Panel:
    return lines(
        Text(
            title="Pushes not applied",
            shows="Updates per second that were discarded as too late, or refused.",
            normal="0; with ringmaster or --discard-delay the slowest workers' updates are discarded.",
            bad="A worker whose updates are all discarded only costs: leave it out, or raise the limit. Refused: see "
            "Refusals by reason on Server.",
        ),
        Query(rate("ormo_pushes_total", "outcome", where='outcome=~"discarded|refused"'), "{{outcome}} {{instance}}"),
        unit="count:updates/s",
    )


def _steps() -> Panel:
    return lines(
        Text(
            title="Where a worker's step goes",
            shows=f"Mean time of each stage of a step (compute, push, wait, pull) per worker. {_NEEDS_EXPORTER}",
            normal="Mostly compute.",
            bad="push and pull: the network is slow, or the model is large for it. wait: the server has no ticket to "
            "give.",
        ),
        Query(
            at_workers_of_the_run(mean("ormo_worker_step_seconds", "stage", own=True)),
            "{{stage}} " + _WORKER,
        ),
        unit="s",
    )


def _outcomes() -> Panel:
    return lines(
        Text(
            title="Steps by outcome",
            shows=f"Steps per second of each worker, by what became of the update. {_NEEDS_EXPORTER}",
            normal="applied; some discarded with a method that discards.",
            bad="refused or lost: computed for nothing. The worker's log has the reason.",
        ),
        Query(
            at_workers_of_the_run(rate("ormo_worker_steps_total", "outcome", own=True)),
            "{{outcome}} " + _WORKER,
        ),
        unit="count:steps/s",
    )


def _retries() -> Panel:
    return lines(
        Text(
            title="Retries and rejoins",
            shows="Calls that a worker had to repeat, by cause, and joins after the first, within each step. "
            f"{_NEEDS_EXPORTER}",
            normal="None, but for a restart of the server.",
            bad="UNAVAILABLE or DEADLINE_EXCEEDED all the time: the network between that worker and the server is "
            "broken.",
        ),
        Query(
            at_workers_of_the_run(increase("ormo_worker_retries_total", "cause", own=True)),
            "{{cause}} " + _WORKER,
        ),
        Query(at_workers_of_the_run(increase("ormo_worker_rejoins_total", own=True)), "rejoins " + _WORKER),
        unit="none",
    )


def _gpu() -> Panel:
    return lines(
        Text(
            title="GPU memory",
            shows="Memory that PyTorch has allocated and reserved on each worker's GPU, and the peak. "
            f"{_NEEDS_EXPORTER}",
            normal="Flat after the first steps.",
            bad="allocated climbs: the training loop keeps graphs alive, such as losses summed without .item().",
        ),
        Query(
            at_workers_of_the_run("sum by (job, instance, kind) (ormo_worker_gpu_memory_bytes)"),
            "{{kind}} " + _WORKER,
        ),
        unit="bytes",
        no_value="no worker on a GPU",
    )
