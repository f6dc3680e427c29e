"""The command `ormo-ray`."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ormo_runtime import logs
from ormo_runtime.process import prepare_process
from ormo_runtime.settings_loader import BAD_SETTINGS_EXIT_CODE, load_settings
from ormo_worker.integrations.ray.settings import RaySettings, ScaleSettings

if TYPE_CHECKING:
    from ormo_worker.integrations.ray.driver import Run

_LOG = logging.getLogger(__name__)
_INTERRUPTED_EXIT_CODE = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; without a command's name, train. Returns the exit code."""
    prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["scale"]:
        scaling = load_settings(ScaleSettings, arguments[1:], program="ormo-ray scale")
        return _guarded("ormo-ray scale", lambda: _scale(scaling))
    settings = load_settings(RaySettings, arguments, program="ormo-ray")
    return _guarded("ormo-ray", lambda: _train(settings))


def _guarded(program: str, command: Callable[[], int]) -> int:
    if importlib.util.find_spec("ray") is None:
        logs.last_words(program, "Ray is not installed: pip install 'ormo-parameter-server[ray]'", "text")
        return BAD_SETTINGS_EXIT_CODE
    from ormo_worker.integrations.ray.driver import RunFailed

    logs.set_up("info", "text")
    try:
        return command()
    except RunFailed as failed:
        logs.last_words(program, failed, "text")
        return failed.code
    except KeyboardInterrupt:
        return _INTERRUPTED_EXIT_CODE


def _scale(settings: ScaleSettings) -> int:
    from ormo_worker.integrations.ray.driver import scale

    sys.stdout.write(scale(settings) + "\n")
    return 0


def _train(settings: RaySettings) -> int:
    from ormo_worker.integrations.ray.driver import Run, connected

    with connected(settings.address, settings.working_dir):
        run = Run(settings)
        code = 0
        try:
            run.train()
        except KeyboardInterrupt:
            code = _INTERRUPTED_EXIT_CODE
            _LOG.info("stopping: workers leave, then the server writes a checkpoint; once more ends all at once")
        finally:
            _stop(run)
        _LOG.info("%s", run.last_words())
        return code


def _stop(run: "Run") -> None:
    from ormo_runtime.process import leave_on_signals

    leave_on_signals()  # the first signal is heeded by now
    try:
        run.stop()
    except KeyboardInterrupt:
        _LOG.warning("ending all at once")
        run.kill()
        raise


if __name__ == "__main__":
    sys.exit(main())
