"""Looks every pinned dependency up in the database of advisories: `python tests/audit.py constraints.txt`.

Ends with 1 if one has a known vulnerability. Where the database can't be reached it says so, loudly, and ends with 0:
what has not been looked up is not called sound. Anything else that keeps pip-audit from an answer is a mistake of ours,
such as a file that is not there or is not pinned, and ends with 2.

Only `constraints.txt` is looked up, for it is what people are told to install. `constraints-lowest.txt` is not: it pins
the oldest versions that may be there already, of which some have advisories, and nobody is told to install them. Nor
is `constraints-newest.txt`, which hardly pins anything.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

UNLOOKED, VULNERABLE, MISTAKE = 0, 1, 2
# The last line of pip-audit's log when the network fails: its own sentence, or what it lets through of requests.
UNREACHABLE = re.compile(
    r"ERROR:pip_audit\._cli:Tip: your network may be blocking this service.*"
    r"|requests\.exceptions\.(ConnectionError|ConnectTimeout|ProxyError|ReadTimeout|SSLError|ChunkedEncodingError): .*"
)
# A line of its traceback when the database answers that it is out of order.
OUT_OF_ORDER = re.compile(r"^requests\.exceptions\.HTTPError: 5\d\d .*", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        vulnerable: one line for each advisory.
        unknown: packages that could not be looked up.
        sound: how many have no advisory.
    """

    vulnerable: tuple[str, ...]
    unknown: tuple[str, ...]
    sound: int


def report_of(answer: str) -> Report:
    """What pip-audit's JSON says."""
    vulnerable, unknown, sound = [], [], 0
    for one in json.loads(answer)["dependencies"]:
        if "skip_reason" in one:
            unknown.append(one["name"])
            continue
        for advisory in one["vulns"]:
            fixed = ", ".join(advisory["fix_versions"]) or "no version"
            vulnerable.append(f"{one['name']} {one['version']}: {advisory['id']}, fixed in {fixed}")
        sound += not one["vulns"]
    return Report(tuple(vulnerable), tuple(unknown), sound)


def words(report: Report) -> tuple[str, int]:
    """What to print, and the exit code."""
    lines = [*report.vulnerable, f"{report.sound} packages have no known vulnerability"]
    if report.unknown:
        lines.append(f"NOT LOOKED UP, the database can't be reached or does not know them: {', '.join(report.unknown)}")
    if not (report.vulnerable or report.unknown or report.sound):
        return "the file pins nothing: expected lines such as torch==2.13.0", MISTAKE
    return "\n".join(lines), VULNERABLE if report.vulnerable else 0


def outcome(answer: str, log: str, ended: int) -> tuple[str, int]:
    """What to print, and the exit code, from what pip-audit wrote to its two streams and ended with."""
    try:
        text, code = words(report_of(answer))
    except (ValueError, KeyError, TypeError):
        return without_answer(log)
    if bool(ended) != (code == VULNERABLE):  # it ends with 1 where it has found something, and where it fails
        return f"{text}\npip-audit ended with {ended}, which does not go with its answer\n{log}", MISTAKE
    return text, code


def without_answer(log: str) -> tuple[str, int]:
    """As `outcome`, where there is none: only the database's failure is not ours."""
    last = (log.strip().splitlines() or [""])[-1]
    why = UNREACHABLE.match(last) or OUT_OF_ORDER.search(log)
    if why is not None:
        return f"NOT LOOKED UP, the database can't be reached: {why[0]}", UNLOOKED
    return f"pip-audit gave no answer, and expected was its report: mend what it complains of\n{log}", MISTAKE


def audited(pinned: str) -> tuple[str, int]:
    """Audit a file of pinned versions with the pip-audit beside this Python."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", "-r", pinned]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return "NOT LOOKED UP, the database can't be reached: no answer within 300 seconds", UNLOOKED
    return outcome(run.stdout, run.stderr, run.returncode)


def main(arguments: Sequence[str]) -> int:
    """Audit one file; returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write(f"{len(arguments)} arguments came, expected one file: python tests/audit.py constraints.txt\n")
        return MISTAKE
    text, code = audited(*arguments)
    sys.stdout.write(text + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
