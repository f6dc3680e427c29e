"""Nobody who does not ask for a library gets it."""

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def libraries() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line).name for line in project["optional-dependencies"]["integrations"]]


def test_using_a_worker_imports_none_of_them() -> None:
    code = (
        "import sys, ormo_worker, ormo_worker.integrations, ormo_worker.training, ormo_server.cli\n"
        "for name in ormo_worker.__all__: getattr(ormo_worker, name)\n"
        f"print([name for name in {libraries()!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
