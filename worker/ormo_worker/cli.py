"""The command line: `ormo-worker run` and `ormo-worker evaluate`."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ormo_runtime import logs
from ormo_runtime.process import end_with, keep_freed_memory, leave_on_signals, prepare_process
from ormo_runtime.settings import UsageError
from ormo_runtime.settings_loader import BAD_SETTINGS_EXIT_CODE, dispatch, load_settings
from ormo_worker.processes import Place, Processes, end_with_parent
from ormo_worker.settings import EvaluateSettings, RunSettings

USAGE = """usage: ormo-worker COMMAND [FLAGS]

commands:
  run        train a task as one of a parameter server's workers
  evaluate   evaluate a run's parameters on the test set while it goes on

`ormo-worker COMMAND --help` lists the flags.

exit codes: 0 the run is over, or the worker left it on SIGINT or SIGTERM; 1 failed; 2 settings or task can't be used;
3 another process has taken this worker's place. All but 0 come with a sentence on stderr.
"""
FAILED_EXIT_CODE = 1
REPLACED_EXIT_CODE = 3


def program() -> NoReturn:
    """What `ormo-worker` runs."""
    end_with(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    prepare_process()
    commands = {
        "run": lambda rest: _run(load_settings(RunSettings, rest, program="ormo-worker run"), rest),
        "evaluate": lambda rest: _evaluate(load_settings(EvaluateSettings, rest, program="ormo-worker evaluate")),
    }
    return dispatch(sys.argv[1:] if argv is None else argv, commands, program="ormo-worker", usage=USAGE)


def _run(settings: RunSettings, arguments: Sequence[str]) -> int:
    from ormo_worker.client.arguments import default_worker_id

    place = Place.found(os.environ)
    # Made up here already, so that every line of the log can have it.
    worker = settings.worker_id or default_worker_id()
    named = settings.model_copy(update={"worker_id": worker})
    if place is None and settings.processes > 1:
        logs.set_up(settings.log_level, settings.log_format, logs.Fields(worker=worker))
        leave_on_signals()
        return Processes([*arguments, "--worker-id", worker], settings.processes).run()
    _set_up_logs(named, place)
    if place is not None:
        # Or each rank would be told, by a line of C++'s, that all parameters of this model have gradients.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        end_with_parent()

    if settings.keep_freed_memory:
        keep_freed_memory()

    def command() -> None:
        from ormo_worker.training import run  # with PyTorch, which `--help` need not wait for

        run(named, place)

    return _run_guarded(command, "ormo-worker run", settings.log_format)


def _set_up_logs(settings: RunSettings, place: Place | None) -> None:
    if place is None or place.rank == 0:
        logs.set_up(settings.log_level, settings.log_format, logs.Fields(worker=settings.worker_id or ""))
    else:  # whatever befalls the worker is said once, by rank 0
        logs.set_up("error", settings.log_format, logs.Fields(rank=place.rank))


def _evaluate(settings: EvaluateSettings) -> int:
    logs.set_up(settings.log_level, settings.log_format)

    if settings.keep_freed_memory:
        keep_freed_memory()

    def command() -> None:
        from ormo_worker.evaluation import run

        run(settings)

    return _run_guarded(command, "ormo-worker evaluate", settings.log_format)


def _run_guarded(command: Callable[[], None], program: str, log_format: logs.LogFormat) -> int:
    """Run it, with errors as sentences and exit codes, and signals as a way to leave."""
    leave_on_signals()
    try:
        command()
    except KeyboardInterrupt:
        logging.getLogger(__name__).info("interrupted: left the run")
        return 0
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        logs.last_words(program, error, log_format)
        return code
    return 0


def _exit_code(error: Exception) -> int | None:
    """The exit code for an error whose sentence says it all; None for one that needs its traceback."""
    from ormo_worker.errors import OrmoError, Replaced

    if isinstance(error, UsageError):
        return BAD_SETTINGS_EXIT_CODE
    if isinstance(error, Replaced):
        return REPLACED_EXIT_CODE
    return FAILED_EXIT_CODE if isinstance(error, OrmoError) else None
