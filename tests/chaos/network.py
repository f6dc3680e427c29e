"""A network of the run's own, in which packets can be lost; where the system permits one."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

_OWN = "CHAOS_OWN_NETWORK"
_PROGRAMS = ("unshare", "ip", "nft")
_CHAIN = ("inet", "chaos", "arriving")


def enter_own(command: Sequence[str]) -> bool:
    """Start the command again in a network namespace of its own, or go on in one.

    Returns:
        Whether this process is in one; False where it is not permitted, or a program is missing.
    """
    if os.environ.get(_OWN) == "yes":
        return _prepared()
    if any(shutil.which(name) is None for name in _PROGRAMS):
        return False
    unshare = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        return False
    os.environ[_OWN] = "yes"
    sys.stdout.flush()
    os.execvp(unshare[0], [*unshare, *command])
    raise AssertionError("exec does not return")


def _prepared() -> bool:
    steps = (
        ("ip", "link", "set", "lo", "up"),
        ("nft", "add", "table", *_CHAIN[:2]),
        ("nft", "add", "chain", *_CHAIN, "{ type filter hook input priority 0; }"),
    )
    return all(subprocess.run(step, capture_output=True, check=False).returncode == 0 for step in steps)


@contextlib.contextmanager
def losing(percent: int) -> Iterator[None]:
    """Inside, so many of a hundred packets are lost, whoever sends them."""
    rule = ("numgen", "random", "mod", "100", "<", str(percent), "drop")
    subprocess.run(["nft", "add", "rule", *_CHAIN, *rule], check=True)
    try:
        yield
    finally:
        subprocess.run(["nft", "flush", "chain", *_CHAIN], check=True)
