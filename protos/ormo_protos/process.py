"""What each of our programs does before anything else: it takes what stands round it as it is."""

import codecs
import io
import os
import sys

from ormo_protos.patient_stream import open_standard_streams

# Images of web services set it. prometheus_client would keep our values in files of that folder, where they outlive us,
# and find no folder where only the variable was inherited.
SHARED_VALUES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
# What our own texts have beside ASCII; in what others have said, an escape tells more than a question mark.
_SPELLED = {"–": "-", "…": "...", "·": "*", "×": "x", "β": "beta", "η": "eta", "λ": "lambda", "τ": "tau"}


def prepare_process() -> None:
    """Let stdout and stderr take every text in whatever encoding they have, and keep metrics in this process.

    Comes before prometheus_client is imported, which looks once.
    """
    open_standard_streams()
    codecs.register_error("spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else somebody has put something of their own there
            stream.reconfigure(errors="spelled")
    for variable in SHARED_VALUES:
        os.environ.pop(variable, None)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """See `codecs.register_error`: another text for what an encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_SPELLED.get(letter, ascii(letter)[1:-1]) for letter in letters), error.end
