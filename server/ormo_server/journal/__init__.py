"""The journal: what the core was given since the last checkpoint, so that a crash loses nothing that was acknowledged.

directory/journal/
    inputs-00000003.log         a line for each input, in order: CRC-32, a space, JSON; a checkpoint begins a new file
    gradients-00000005.bin      what gradients carried, one after the other; lines of the logs say where

A gradient's bytes are written before the core's lock is taken, its line is put in order under the lock and written
after it, and the worker hears of its result after that: one write, and one fsync, serve all who wait.
"""

from ormo_server.journal.nothing import NoJournal
from ormo_server.journal.reader import Reading
from ormo_server.journal.records import Record, StoredGradient, is_journal
from ormo_server.journal.replay import replay
from ormo_server.journal.writer import Fsync, Journal

__all__ = ["Fsync", "Journal", "NoJournal", "Reading", "Record", "StoredGradient", "is_journal", "replay"]
