"""What tells a user's mistake from a fault of ours, in all programs."""


class UsageError(Exception):
    """What was asked for can't be done; the message says in one sentence what came, what was expected, what to do."""
