"""The dashboard *Training*: does the model learn, and how fast."""

from grafana_foundation_sdk.models.dashboard import Dashboard, Panel

from ormo_dashboards import limits
from ormo_dashboards.board import Section, board
from ormo_dashboards.panels import (
    CRITICAL,
    FULL,
    THIRD,
    Query,
    Size,
    Text,
    distribution,
    facts,
    lines,
    number,
    with_right_axis,
)
from ormo_dashboards.promql import RUN, buckets, increase, mean, quantile, rate, series
from ormo_dashboards.uids import SERVER, STALENESS, TRAINING

_WORKER = "{{worker}} @ {{instance}}"


def training() -> Dashboard:
    """Loss, accuracy, learning rate, throughput and updates of the selected runs."""
    description = "Does the model learn, and how fast? For who is slow see Staleness; for the machine see Server."
    sections = [
        Section("At a glance", [*_run(), *_health()]),
        Section("Does it learn?", [_loss(), _accuracy(), _worker_loss(), _step_size()]),
        Section("How fast?", [_samples(), _gradients(), _iteration()]),
        Section("Updates", [_norms(), _worker_norms(), _non_finite()]),
        Section(
            "Local steps (of a run that has them)",
            [_local_steps(), _worker_local_steps(), _lost_local_steps()],
            collapsed=True,
        ),
        Section("What is trained, and how", [_settings(), _model_size(), _bucket_size()]),
    ]
    return board(TRAINING, "OrMo / Training", description, sections)


def _run() -> list[Panel]:
    return [
        number(
            Text(
                title="Phase",
                shows="What the run is doing: waiting for a model or for workers, training, finished, draining.",
                normal="training, and finished at the end.",
                bad="waiting_for_workers for long: no worker reaches the server, see their logs; or --min-workers is "
                "too high.",
            ),
            Query(f"{series('ormo_run_phase')} == 1", "{{phase}}"),
            unit="none",
            shows_name=True,
        ),
        number(
            Text(
                title="Alerts firing",
                shows="How many alerts fire for the selected runs.",
                normal="0.",
                bad="Anything else. Their names stand beside the red marks of each graph; the runbook says what to do.",
            ),
            Query(f'count(ALERTS{{alertstate="firing", {RUN}}}) or vector(0)', "alerts"),
            unit="none",
            limits={1: CRITICAL},
        ),
        number(
            Text(
                title="Live workers",
                shows="Workers whose lease is valid.",
                normal="As many as were started.",
                bad="Fewer: see on Staleness who fell silent, then that worker's log. None: nothing is trained.",
            ),
            Query(series("ormo_live_workers")),
            unit="none",
            limits={0: CRITICAL, 1: "text"},
            link_to=STALENESS,
        ),
        number(
            Text(
                title="Updates per second",
                shows="Updates applied per second.",
                normal="Steady; it follows the number and the speed of the workers.",
                bad="0 while training: no progress. Staleness shows who still pushes, Server what is refused.",
            ),
            Query(rate("ormo_pushes_total", where='outcome="applied"')),
            unit="count:updates/s",
        ),
        number(
            Text(
                title="Samples per second",
                shows="Training samples per second, as workers report them with their updates.",
                normal="Steady.",
                bad="0 while updates are applied: the training loop passes no `samples` to `step`.",
            ),
            Query(rate("ormo_samples_total")),
            unit="count:samples/s",
        ),
        number(
            Text(
                title="Iteration",
                shows="Updates applied since the run began.",
                normal="Rises.",
                bad="It stands still while the phase is training; or it fell: the server went back to its last "
                "checkpoint.",
            ),
            Query(series("ormo_iteration")),
            unit="locale",
        ),
    ]


def _health() -> list[Panel]:
    return [
        number(
            Text(
                title="Training loss",
                shows="Mean of the losses that live workers reported last.",
                normal="Falls over the run; a single value says little.",
                bad="NaN: the model has diverged. Stop, lower the learning rate or clip, go on from an older "
                "checkpoint.",
            ),
            Query(series("ormo_training_loss")),
            unit="none",
            decimals=4,
            no_value="none reported",
        ),
        number(
            Text(
                title="Test accuracy",
                shows="Accuracy of the last evaluation that an evaluator reported.",
                normal="Rises and levels off.",
                bad="Far below what the training loss promises: the model overfits. No value: no evaluator has "
                "reported.",
            ),
            Query(series("ormo_test_accuracy")),
            unit="percentunit",
            decimals=2,
            no_value="no evaluator",
        ),
        number(
            Text(
                title="Learning rate",
                shows="Learning rate η in force.",
                normal="Follows the schedule: it rises in the warm-up, then stays, steps down or decays.",
                bad="Not what was meant: compare the schedule's settings. The gradients of a bucket are summed, "
                "so a rate for one machine is to be divided by about K; with local steps they are averaged.",
            ),
            Query(series("ormo_learning_rate")),
            unit="sci",
        ),
        number(
            Text(
                title="Delay, p99, in K",
                shows="The delay that 99 % of the updates stay below, divided by K.",
                normal="1 to 2 among equal workers; about n where a worker is n times slower.",
                bad="Red: the alert's limit. Staleness shows who is slow; leave that worker out, give it smaller "
                "batches, or take ormo-da.",
            ),
            Query(quantile(0.99, "ormo_gradient_relative_delay")),
            unit="none",
            decimals=1,
            limits={limits.RELATIVE_DELAY: CRITICAL},
            link_to=STALENESS,
        ),
        number(
            Text(
                title="Unsaved work",
                shows="How much time of training a crash would cost now (from the shipped recording rules).",
                normal="Below the interval of --checkpoint-seconds; nothing while all is saved.",
                bad="Several intervals: see Checkpoints on Server.",
            ),
            Query(series("instance:ormo_unsaved_work:seconds")),
            unit="s",
            decimals=1,
            link_to=SERVER,
            no_value="all saved",
        ),
        number(
            Text(
                title="Pushes refused",
                shows="Share of the updates that were refused; not counted are non-finite ones and those after the "
                "end.",
                normal="0.",
                bad="Red: the alert's limit, computed for nothing. Refusals by reason on Server says why.",
            ),
            Query(_refused('reason!~"DRAINING|FINISHED|NON_FINITE"')),
            unit="percentunit",
            decimals=1,
            limits={limits.REFUSED_PUSHES: CRITICAL},
            link_to=SERVER,
        ),
    ]


def _refused(reasons: str) -> str:
    """The share of all pushes that was refused for these reasons."""
    refused = rate("ormo_pushes_total", where=f'outcome="refused", {reasons}')
    pushes = rate("ormo_pushes_total")
    # No such refusal has happened yet where there is no series of it, so the share is 0 if updates come at all.
    return f"({refused} or 0 * {pushes}) / ({pushes} > 0)"


def _loss() -> Panel:
    return lines(
        Text(
            title="Loss",
            shows="Training loss (mean of what live workers reported last) and test loss (as evaluators reported it).",
            normal="Both fall; the test loss ends somewhat above.",
            bad="A rise or jumps: the learning rate is too high for this K. A gap in the training loss: it was NaN, "
            "the model has diverged. Test loss rises while training loss falls: overfitting.",
        ),
        Query(series("ormo_training_loss"), "training {{instance}}"),
        Query(series("ormo_test_loss"), "test {{instance}}"),
        unit="none",
    )


def _accuracy() -> Panel:
    return lines(
        Text(
            title="Test accuracy",
            shows="Share of the test set that evaluators found classified rightly.",
            normal="Rises fast, then slowly; steps up where the learning rate steps down.",
            bad="Falls, or stays at chance: see Loss and Learning rate. No line: no evaluator has reported yet.",
        ),
        Query(series("ormo_test_accuracy")),
        unit="percentunit",
        no_value="no evaluator has reported",
    )


def _worker_loss() -> Panel:
    return lines(
        Text(
            title="Training loss per worker",
            shows="The loss that each worker reported last.",
            normal="A band that falls.",
            bad="One worker far off the others: look at its data and its hardware; it pulls the model with it.",
        ),
        Query(series("ormo_worker_training_loss"), _WORKER),
        unit="none",
    )


def _step_size() -> Panel:
    panel = lines(
        Text(
            title="Learning rate and step scale",
            shows="Learning rate in force, and the mean share of it that updates were applied with (right axis).",
            normal="The rate follows its schedule. The scale is 1 with the step scale constant, and about 1 with "
            "rescaled.",
            bad="With delay-adaptive a scale well below 1: many updates are later than the threshold (2K, with "
            "asgd-da K), so training slows down. "
            "Look for the slow workers on Staleness.",
        ),
        Query(series("ormo_learning_rate"), "learning rate {{instance}}"),
        Query(mean("ormo_step_scale"), "mean scale {{instance}}"),
        unit="sci",
    )
    return with_right_axis(panel, "/^mean scale/", "percentunit")


def _samples() -> Panel:
    return lines(
        Text(
            title="Samples per second",
            shows="Training samples per second over all workers.",
            normal="Steady.",
            bad="A step down: a worker left or slowed down. Nothing at all: no progress.",
        ),
        Query(rate("ormo_samples_total")),
        unit="count:samples/s",
        size=THIRD,
    )


def _gradients() -> Panel:
    return lines(
        Text(
            title="Updates per second and worker",
            shows="Updates applied per second, stacked by worker.",
            normal="Bands of steady height, as high as each worker is fast.",
            bad="A band that thins out: that worker slows down. All of them at once: the server or the network; see "
            "Server.",
        ),
        Query(rate("ormo_worker_gradients_total", "worker"), _WORKER),
        unit="count:updates/s",
        size=THIRD,
        stacked=True,
    )


def _iteration() -> Panel:
    return lines(
        Text(
            title="Iteration",
            shows="Updates applied, and the iteration that the last test result belongs to.",
            normal="Rises steadily, the evaluated one following in steps.",
            bad="Flat while training: no progress. A fall: the server restarted from a checkpoint. An evaluated one "
            "that falls behind: the evaluator is too slow or gone.",
        ),
        Query(series("ormo_iteration"), "applied {{instance}}"),
        Query(series("ormo_test_iteration"), "evaluated {{instance}}"),
        unit="locale",
        size=THIRD,
    )


def _norms() -> Panel:
    return distribution(
        Text(
            title="Gradient norm",
            shows="How large the applied updates are (L2 norm), as a heatmap.",
            normal="A narrow band that falls slowly.",
            bad="A band that climbs announces divergence: lower the learning rate or clip gradients in the workers. "
            "Two bands: workers compute different things, see the norms per worker.",
        ),
        buckets("ormo_gradient_norm"),
        unit="sci",
        size=THIRD,
    )


def _worker_norms() -> Panel:
    return lines(
        Text(
            title="Gradient norm per worker",
            shows="L2 norm of the last update of each worker.",
            normal="Alike, within a factor of a few.",
            bad="One worker apart: other data, another batch size, or faulty hardware.",
        ),
        Query(series("ormo_worker_gradient_norm"), _WORKER),
        unit="sci",
        size=THIRD,
        logarithmic=True,
    )


def _non_finite() -> Panel:
    return lines(
        Text(
            title="Non-finite updates",
            shows="Share of the updates that were refused because they have NaN or infinite values.",
            normal="0; a few now and then in mixed precision.",
            bad="Above the red line, the alert's limit: from all workers, training diverges, so lower the learning "
            "rate or clip; from one, its device or data is bad, and the server's log names it.",
        ),
        Query(_refused('reason="NON_FINITE"')),
        unit="percentunit",
        size=THIRD,
        limits={limits.NON_FINITE_GRADIENTS: CRITICAL},
    )


def _local_steps() -> Panel:
    return distribution(
        Text(
            title="Local steps per update",
            shows="How many steps of a worker's own optimizer each applied update holds, as a heatmap.",
            normal="One band at --local-steps; with --local-steps-by-speed others below it, a band for each speed.",
            bad="Many small ones: workers end and start again all the time, each with what it had.",
        ),
        buckets("ormo_gradient_local_steps"),
        unit="none",
        size=THIRD,
    )


def _worker_local_steps() -> Panel:
    return lines(
        Text(
            title="Local steps per worker",
            shows="Local steps in the last update of each worker.",
            normal="Flat lines; with --local-steps-by-speed one level for each kind of machine.",
            bad="With --local-steps-by-speed a line that falls: that worker slows down, or the fastest got faster.",
        ),
        Query(series("ormo_worker_local_steps"), _WORKER),
        unit="none",
        size=THIRD,
    )


def _lost_local_steps() -> Panel:
    return lines(
        Text(
            title="Local steps lost",
            shows="Local steps that never count, as their ticket was void or their worker is gone, within each step.",
            normal="0; with spot machines at most --local-steps for each that is taken away.",
            bad="A peak at a restart of the server: with --journal tickets outlive it. More without one: leases or "
            "tickets run out while workers compute; raise --failure-timeout-seconds or --ticket-timeout-seconds.",
        ),
        Query(increase("ormo_lost_local_steps_total")),
        unit="none",
        size=THIRD,
    )


def _settings() -> Panel:
    return facts(
        Text(
            title="Settings",
            shows="The method of each run and the settings that it trains by.",
            normal="What was meant.",
            bad="It differs from what was meant: flags go before the environment, the environment before the file.",
        ),
        series("ormo_settings_info"),
        labels={
            "instance": "run",
            "method": "method",
            "update_rule": "update rule",
            "step_scale": "step scale",
            "scheduler": "scheduler",
            "bucket": "bucket",
            "local_steps": "local steps",
            "momentum": "momentum",
            "weight_decay": "weight decay",
            "schedule": "schedule",
        },
        size=Size(FULL.width, 5),
    )


def _model_size() -> Panel:
    panel = lines(
        Text(
            title="Model",
            shows="Elements of all trainable tensors, and their bytes on the server (right axis).",
            normal="Constant.",
            bad="Another size than expected: the first worker offered another model; start a new run directory.",
        ),
        Query(series("ormo_model_parameters"), "parameters {{instance}}"),
        Query(series("ormo_model_bytes"), "bytes {{instance}}"),
        unit="short",
    )
    return with_right_axis(panel, "/^bytes/", "bytes")


def _bucket_size() -> Panel:
    panel = lines(
        Text(
            title="Bucket size and newest bucket",
            shows="K, the updates in a bucket, and the number of the newest bucket (right axis).",
            normal="K is the number of slots of the live workers, unless it was fixed; the newest bucket rises.",
            bad="K jumps up and down: workers come and go, or lose their leases; see Staleness.",
        ),
        Query(series("ormo_bucket_size"), "K {{instance}}"),
        Query(series("ormo_newest_bucket_number"), "newest bucket {{instance}}"),
        unit="none",
    )
    return with_right_axis(panel, "/^newest bucket/", "locale")
