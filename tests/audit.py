"""Looks every pinned dependency up in the database of advisories: `python tests/audit.py constraints.txt`.

Ends with 1 if one has a known vulnerability. Where the database can't be reached it says so, loudly, and ends with 0:
what has not been looked up is not called sound.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass


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
    return "\n".join(lines), 1 if report.vulnerable else 0


def main(arguments: Sequence[str]) -> int:
    """Audit a file of pinned versions with the pip-audit beside this Python."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", "-r", *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        report = report_of(run.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        sys.stdout.write(f"NOT LOOKED UP: pip-audit gave no answer ({type(error).__name__})\n")
        return 0
    text, code = words(report)
    sys.stdout.write(text + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
