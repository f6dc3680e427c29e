"""The journal: what the core was given since the last checkpoint, so that a crash loses nothing that was acknowledged.

directory/journal/
    inputs-00000003.log         a line for each input, in order: see `chain_lines`; a checkpoint begins a new file
    gradients-00000005.bin      what gradients carried, one after the other; lines of the logs say where. Those of some
                                kilobytes are in their lines
    acknowledged-00000001       how far results were told, for a server whose first log has this number: see `mark`

A large gradient's bytes are written as they arrive, before the core's lock is taken; its line is put in order under the
lock and written after it, and the worker hears of its result after that: one write, and one fsync, serve all who wait.
So what nobody was told of may be missing at the end, and after a crash often is. Whatever else is missing shows in the
files.
"""

from ormo_server.journal.gradients import Storing
from ormo_server.journal.records import KeptGradient, Record, StoredGradient, next_log
from ormo_server.journal.replay import Reading, UnsoundRecord, gradient_in, is_chained, is_journal, replay, told_since
from ormo_server.journal.writer import Fsync, Journal

__all__ = [
    "Fsync",
    "Journal",
    "KeptGradient",
    "Reading",
    "Record",
    "StoredGradient",
    "Storing",
    "UnsoundRecord",
    "gradient_in",
    "is_chained",
    "is_journal",
    "next_log",
    "replay",
    "told_since",
]
