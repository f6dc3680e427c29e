"""What a process in a container sees, and does, on any platform: each is a program for `python -c` in there."""

import json
from typing import Any

from deploy.platforms.platform import Platform

# Where our program is: process 1, or the child of an init or a shell that is.
_FIND = """
import glob, json, os, pathlib, resource, sys
def words(path):
    try:
        return pathlib.Path(path).read_bytes().decode().split("\\0")
    except OSError:
        return []
pid = min(
    int(path.split("/")[2])
    for path in glob.glob("/proc/[0-9]*/cmdline")
    if words(path)[1:2] and words(path)[1].endswith(("/ormo-server", "/ormo-worker"))
)
"""
# A SIGKILL of the kernel's own, which reaches process 1 too, as one from inside does not: it has used up its time.
_KILL = _FIND + "resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))"
_FACTS = (
    _FIND
    + """
lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
def first(*paths):
    for path in paths:
        try:
            return pathlib.Path("/sys/fs/cgroup", path).read_text()
        except OSError:
            pass
    return ""
def field(text, name):
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[:1] == [name]), None)
def writable(folder):
    try:
        path = pathlib.Path(folder, "try"); path.touch(); path.unlink()
    except OSError:
        return False
    return True
memory = first("memory/memory.stat", "memory.stat")
usage = field(memory, "total_rss")
ours = os.path.dirname(os.path.dirname(sys.executable))
print(json.dumps({
    "user": int(status["Uid"].split()[0]),
    "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapBnd"], 16),
    "may_gain": status["NoNewPrivs"].strip() != "1",
    "writable": [folder for folder in ("/", "/etc", "/usr/bin", "/work", "/var/tmp", ours) if writable(folder)],
    "not_writable": [folder for folder in ("/tmp",) if not writable(folder)],
    "memory_bytes": field(memory, "anon") if usage is None else usage,
    "memory_limit_bytes": first("memory/memory.limit_in_bytes", "memory.max").strip(),
    "killed_for_memory": field(first("memory/memory.oom_control", "memory.events"), "oom_kill") or 0,
    "processes_limit": first("pids/pids.max", "pids.max").strip(),
}))
"""
)
_METRICS = """
import os, urllib.request
port = os.environ["ORMO_METRICS_LISTEN"].rpartition(":")[2]
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(direct.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode())
"""
_CERTIFICATE = "import ssl; print(ssl.get_server_certificate(('localhost', 50051)))"

Facts = dict[str, Any]


def facts(platform: Platform, pod: str) -> Facts:
    """What a program may do and use; `checks.unconfined` judges it."""
    found: Facts = json.loads(platform.execute(pod, "python", "-c", _FACTS))
    return found


def kill(platform: Platform, pod: str) -> None:
    """SIGKILL of the program, as by a crash."""
    platform.execute(pod, "python", "-c", _KILL)


def metrics(platform: Platform, pod: str) -> dict[str, float]:
    """Those without labels."""
    lines = platform.execute(pod, "python", "-c", _METRICS).splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2}


def certificate(platform: Platform, server: str) -> str:
    """The one that the server shows now, as PEM."""
    return platform.execute(server, "python", "-c", _CERTIFICATE)
