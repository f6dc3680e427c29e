"""A network and a view of file systems of the run's own: packets can be lost, disks mounted; where it is permitted."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

_OWN = "CHAOS_OWN_NETWORK"
_PROGRAMS = ("unshare", "ip")
_CHAIN = ("inet", "chaos", "arriving")


def enter_own(command: Sequence[str]) -> bool:
    """Start the command again in namespaces of its own, or go on in them.

    Returns:
        Whether this process is in them; False where it is not permitted, or a program is missing.
    """
    if os.environ.get(_OWN) == "yes":
        return True
    if any(shutil.which(name) is None for name in _PROGRAMS):
        return False
    unshare = ["unshare", "--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        return False
    os.environ[_OWN] = "yes"
    sys.stdout.flush()
    os.execvp(unshare[0], [*unshare, *command])
    raise AssertionError("exec does not return")


def prepare() -> bool:
    """In a network of its own: make it one. Returns whether packets can be lost in it."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    steps = (
        ("nft", "add", "table", *_CHAIN[:2]),
        ("nft", "add", "chain", *_CHAIN, "{ type filter hook input priority 0; }"),
    )
    if shutil.which("nft") is None:
        return False
    return all(subprocess.run(step, capture_output=True, check=False).returncode == 0 for step in steps)


@contextlib.contextmanager
def losing(percent: int) -> Iterator[None]:
    """Inside, so many of a hundred packets are lost, whoever sends them."""
    rule = ("numgen", "random", "mod", "100", "<", str(percent), "counter", "drop")
    subprocess.run(["nft", "add", "rule", *_CHAIN, *rule], check=True)
    try:
        yield
    finally:
        subprocess.run(["nft", "flush", "chain", *_CHAIN], check=True)


def lost() -> int:
    """How many packets were lost since `losing` began."""
    listed = subprocess.run(["nft", "list", "chain", *_CHAIN], capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"counter packets (\d+)", listed.stdout)))
