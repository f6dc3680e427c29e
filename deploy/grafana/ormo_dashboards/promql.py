"""PromQL as the panels need it: always of the selected runs, and never mixing one run with another."""

RUN = 'job=~"$job", instance=~"$instance"'
_RATE = "$__rate_interval"


def series(name: str, *matchers: str) -> str:
    """The series of a metric that belong to the selected runs."""
    return f"{name}{{{', '.join((RUN, *matchers))}}}"


def per_run(expression: str, *by: str, aggregation: str = "sum") -> str:
    """An expression aggregated to one series per run and value of `by`."""
    return f"{aggregation} by ({', '.join(('job', 'instance', *by))}) ({expression})"


def rate(counter: str, *by: str, where: str = "", own: bool = False) -> str:
    """Events per second, per run; with `own` of a metric that the workers export themselves, per worker process."""
    return per_run(f"rate({_selected(counter, where, own)}[{_RATE}])", *by)


def increase(counter: str, *by: str, where: str = "", own: bool = False) -> str:
    """Events within one step of the graph, per run or worker process."""
    return per_run(f"increase({_selected(counter, where, own)}[{_RATE}])", *by)


def mean(histogram: str, *by: str, own: bool = False) -> str:
    """Mean of the observations, per run or worker process."""
    return f"{rate(f'{histogram}_sum', *by, own=own)} / {rate(f'{histogram}_count', *by, own=own)}"


def share(part: str, whole: str, *by: str) -> str:
    """What one counter rose by as a share of what another did, per run; of two that rise in the same moments.

    Right however rarely they rise. What rises once in minutes has no rate: 0 most of the time, and far too much then.
    """
    return f"{rate(part, *by)} / ({rate(whole, *by)} > 0)"


def quantile(share: float, histogram: str, *by: str, where: str = "") -> str:
    """The value that a share of the observations stays below, per run."""
    return f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', 'le', *by, where=where)})"


def buckets(histogram: str) -> str:
    """What a heatmap shows: observations per bucket and step, over all selected runs together."""
    return f"sum by (le) (increase({series(f'{histogram}_bucket')}[{_RATE}]))"


def seconds_since(timestamp: str) -> str:
    """How long ago something last happened."""
    return f"time() - {series(timestamp)}"


def at_workers_of_the_run(expression: str) -> str:
    """An expression over metrics that workers export themselves, for workers of the selected runs and with their id.

    A worker's own metrics say nothing of the run that it works for: its id is what joins them with the server's.
    """
    named = f"({expression}) * on (job, instance) group_left (worker) ormo_worker_process_info"
    return f"({named}) and on (worker) {series('ormo_worker_info')}"


def _selected(name: str, where: str, own: bool) -> str:
    if own:  # the scrape job and instance of a worker are its own, not those of its run
        return f"{name}{{{where}}}" if where else name
    return series(name, where) if where else series(name)
