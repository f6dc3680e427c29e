"""What the engine and the images are made of, fetched once: `python trees.py FOLDER [engine|base|wheels]...`.

Nothing is pulled from a registry of images. Debian's packages are the engine, and stand in for the official image of
Python; the wheels that the images install lie in a folder, from which the tests serve them as a company's index would.
"""

import hashlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
PYTHON = "3.11"
# Engine 26 and Compose 2.26: the oldest stable release of Debian with `start_interval`, which compose.yaml has.
_ENGINE = (
    "trixie",
    ["docker.io", "docker-cli", "docker-compose", "docker-buildx", "iptables", "prometheus", "busybox-static"],
)
# As the official image: a Python with pip and venv, and nothing else.
_BASE = ("bookworm", [f"python{PYTHON}", f"python{PYTHON}-venv", "python3-pip", "python3-venv"])
# Where the official image has its Python, and the first word of its PATH.
_LINK = f'--customize-hook=ln -s /usr/bin/python{PYTHON} "$1/usr/local/bin/python"'


class Trees:
    """Where in a folder what was fetched lies; names tell from what it was made, so that a change makes it anew."""

    def __init__(self, folder: Path) -> None:
        self.engine = folder / f"engine-{_digest(*_ENGINE)}"
        self.base = folder / f"python-{_digest(*_BASE, _LINK)}.tar"
        self.wheels = folder / f"wheels-{_digest(_requirements(), (ROOT / 'constraints.txt').read_text())}"

    def fetch(self, name: str) -> Path:
        """Fetch one of them, if it is not there; returns where it is."""
        path: Path = getattr(self, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _make(path, _COMMANDS[name]())
        return path


def _mmdebstrap(suite: str, packages: Sequence[str], *options: str) -> list[str]:
    if shutil.which("mmdebstrap") is None:
        sys.exit("mmdebstrap is not installed: it is a package of Debian, and of Ubuntu")
    included = f"--include=ca-certificates,{','.join(packages)}"
    # Written once and never trusted after a power cut: not each file has to be on the disk before the next one.
    quickly = "--dpkgopt=force-unsafe-io"
    return ["mmdebstrap", "--quiet", "--variant=minbase", quickly, included, *options, suite]


def _pip_download() -> list[str]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--python-version", PYTHON, "--only-binary", ":all:"]
    return [*pip, "-c", str(ROOT / "constraints.txt"), *_requirements(), "--dest"]


_COMMANDS = {
    "engine": lambda: _mmdebstrap(*_ENGINE),
    "base": lambda: _mmdebstrap(*_BASE, _LINK),
    "wheels": _pip_download,
}


def _make(path: Path, command: Sequence[str]) -> None:
    """Have a command make what its last word is to name, whole or not at all."""
    sys.stderr.write(f"making {path}\n")
    aside = path.with_name(f"new-{path.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    subprocess.run([*command, str(aside)], stdout=sys.stderr, check=True)
    aside.rename(path)


def _requirements() -> list[str]:
    """What deploy/docker/install.sh asks pip for, for both images."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (one for extra in ("server", "worker", "vision") for one in project["optional-dependencies"][extra])
    return [*project["dependencies"], *extras, "hatchling"]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


if __name__ == "__main__":
    for name in sys.argv[2:] or _COMMANDS:
        sys.stdout.write(f"{Trees(Path(sys.argv[1])).fetch(name)}\n")
