"""Full disks, which are waited for, as against broken ones."""

import errno

from ormo_server.core.errors import DiskFull

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_RETRY_SECONDS = 2.0


def is_full(error: OSError) -> bool:
    """Whether this is for lack of room, so that it may go better later."""
    return error.errno in _NO_ROOM


def disk_full(where: object, why: object) -> DiskFull:
    """What a worker is told: it tries again, and training goes on once there is room."""
    return DiskFull(
        f"the journal in {where} can't take more ({why}): make room there, or mend the disk; workers try again by "
        "themselves, and nothing is lost",
        retry_seconds=_RETRY_SECONDS,
    )
