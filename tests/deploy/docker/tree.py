"""The files of `deploy/docker`, and the tools that judge them."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "docker"


def tool(name: str, package: str) -> str:
    """The path of a program: named by ORMO_NAME (as in ORMO_CHECKOV), beside this Python, or on PATH.

    Without it the test is skipped, but fails where all is to be checked.
    """
    beside = Path(sys.executable).parent / name
    found = os.environ.get(f"ORMO_{name.upper().replace('-', '_')}") or shutil.which(str(beside)) or shutil.which(name)
    if found:
        return found
    reason = f"{name} is not there: pip install {package}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
