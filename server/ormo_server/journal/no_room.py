"""Full disks, and want of descriptors or memory, which are waited for, as against broken disks."""

import errno

from ormo_server.core.errors import DiskFull
from ormo_server.store.files import is_scarcity

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_RETRY_SECONDS = 2.0


def may_pass(error: OSError) -> bool:
    """Whether this is for lack of something, so that it may go better later."""
    return error.errno in _NO_ROOM or is_scarcity(error)


def disk_full(where: object, why: object) -> DiskFull:
    """What a worker is told: it tries again, and training goes on once there is room."""
    return _refusal(where, why, "make room there, or mend the disk")


def kept_back(where: object, error: OSError) -> DiskFull:
    """The same for what the system said."""
    if is_scarcity(error):
        return _refusal(where, error.strerror, "see who has them, or raise the limit of open files or of memory")
    return disk_full(where, error.strerror)


def _refusal(where: object, why: object, advice: str) -> DiskFull:
    return DiskFull(
        f"the journal in {where} can't take more ({why}): {advice}; workers try again by themselves, and nothing is "
        "lost",
        retry_seconds=_RETRY_SECONDS,
    )
