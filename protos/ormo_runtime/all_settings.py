"""The names of all settings that our programs take from the environment, which several of them share."""

import difflib

# Server and worker may be installed without each other, so nobody can ask all of them; a test does.
ALL_SETTINGS = frozenset(
    """
    access amp bandwidth batch_size bucket_size checkpoint_seconds checkpoints_kept commit compute_time
    connect_timeout cosine_gradients crash data_dir delay_compensation delay_threshold device directory discard_delay
    drain_seconds epochs evaluate_every every_seconds exit_when_finished failure_timeout final_learning_rate
    give_up_after gradients in_flight insecure join journal journal_fsync journal_max_bytes json keep_freed_memory
    latency learning_rate learning_rates leave listen loader_processes log_format log_level max_bytes_in_flight
    max_gradient_norm max_readers max_refused_share max_workers memory_limit method methods metrics_listen
    milestone_factor milestones min_workers model momentum once over_norm plots processes receive_window
    reflection schedule scheduler seed seeds server server_flags setting slots slots_per_worker slow slow_factor
    sort staleness_bound step_scale stop_after stop_after_gradients stop_after_samples suite target_accuracy task
    test_samples threads ticket_timeout timeout tls_ca tls_cert tls_client_ca tls_key tls_server_name token_file
    trace train_samples update_rule warmup_gradients weight_decay wire_dtype worker_flags worker_id worker_series
    workers workload
    """.split()  # noqa: SIM905 - a list would be a line for each
)
_PREFIX = "ormo_"
# Of 1. So ORMO_BATCHSIZE is near to a setting, and ORMO_SERVER_PORT, as Kubernetes says where a Service is, to none.
_NEAR = 0.8


def nearest_variable(name: str) -> str | None:
    """The variable that was meant by one that no program of ours reads; None for all others, and if none is near."""
    setting = name.lower().removeprefix(_PREFIX)
    if not name.lower().startswith(_PREFIX) or setting in ALL_SETTINGS | {"config"}:
        return None
    near = difflib.get_close_matches(setting, sorted(ALL_SETTINGS), n=1, cutoff=_NEAR)
    return f"{_PREFIX}{near[0]}".upper() if near else None
