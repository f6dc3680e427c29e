"""A run's trace: every input that took effect, in order, as JSON Lines that people and simulations read.

A file has a segment for each start of the server: a `start` row, then a row for each input, all of it but its tensors,
and for each gradient that was refused.
All seconds but `time` are on the run's clock. 64-bit numbers (epochs and incarnations) are hexadecimal text, because
many readers keep 53 bits of a number. With pandas:

    rows = pandas.read_json("trace.jsonl", lines=True)
    rows[rows.event == "pushed"].groupby("worker").delay.describe()
"""

from ormo_server.trace.rows import Recorded, Refused, Segment, Start, TracedSettings, read_trace

__all__ = ["Recorded", "Refused", "Segment", "Start", "TracedSettings", "read_trace"]
