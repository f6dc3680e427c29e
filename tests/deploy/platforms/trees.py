"""What the engine and the images are made of, fetched once: `python trees.py FOLDER [engine|base|wheels]...`.

Nothing is pulled from a registry of images. Debian's packages are the engine, and stand in for the official image of
Python; the wheels that the images install lie in a folder, from which the tests serve them as a company's index would.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PYTHON = "3.11"
# Engine 26 and Compose 2.26: the oldest stable release of Debian with `start_interval`, which compose.yaml has.
_ENGINE = (
    "trixie",
    ["docker.io", "docker-cli", "docker-compose", "docker-buildx", "iptables", "prometheus", "busybox-static"],
)
# As the official image: a Python with pip, what Dockerfiles call, and PyTorch's one need besides. Only unpacked, which
# takes a fifth of the time.
_BASE = (
    "bookworm",
    [
        *(f"python{PYTHON}", "python3-pip", "libstdc++6"),
        *("base-files", "base-passwd", "coreutils", "dash", "grep", "login", "passwd"),
    ],
)


class Trees:
    """Where in a folder what was fetched lies; names tell from what it was made, so that a change makes it anew."""

    def __init__(self, folder: Path) -> None:
        self.engine = folder / f"engine-{_digest(*_ENGINE)}"
        self.base = folder / f"python-{_digest(*_BASE)}.tar"
        self.wheels = folder / f"wheels-{_digest(_requirements(), (ROOT / 'constraints.txt').read_text())}"

    def fetch(self, name: str) -> Path:
        """Fetch one of them, if it is not there; returns where it is."""
        path: Path = getattr(self, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            sys.stderr.write(f"making {path}\n")
            aside = path.with_name(f"new-{path.name}")
            if aside.is_dir():  # of one that was killed
                shutil.rmtree(aside)
            _MADE_BY[name](aside)
            aside.rename(path)
        return path


def _make_engine(path: Path) -> None:
    suite, packages = _ENGINE
    # Written once, and never trusted after a power cut: not each file has to be on the disk before the next one.
    _mmdebstrap("minbase", ["ca-certificates", *packages], "--dpkgopt=force-unsafe-io", suite, path)


def _make_base(path: Path) -> None:
    suite, packages = _BASE
    _mmdebstrap("extract", packages, suite, path)
    # What the packages' scripts would have made: the list of users, and a `python` where the official image has it.
    with tarfile.open(path) as unpacked:
        lists = {name: unpacked.extractfile(f"./usr/share/base-passwd/{name}.master").read() for name in _LISTS}
    with tarfile.open(path, "a") as archive:
        for name, content in lists.items():
            archive.addfile(_entry(f"./etc/{name}", size=len(content)), io.BytesIO(content))
        archive.addfile(_entry("./usr/local/bin/python", type=tarfile.SYMTYPE, linkname=f"/usr/bin/python{PYTHON}"))


def _make_wheels(path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--python-version", PYTHON, "--only-binary", ":all:"]
    _run(*pip, "-c", ROOT / "constraints.txt", *_requirements(), "--dest", path)


_LISTS = ("passwd", "group")
_MADE_BY = {"engine": _make_engine, "base": _make_base, "wheels": _make_wheels}


def _entry(name: str, **about: Any) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    for attribute, value in about.items():
        setattr(entry, attribute, value)
    return entry


def _mmdebstrap(variant: str, packages: Sequence[str], *words: object) -> None:
    if shutil.which("mmdebstrap") is None:
        sys.exit("mmdebstrap is not installed: it is a package of Debian, and of Ubuntu")
    _run("mmdebstrap", "--quiet", f"--variant={variant}", f"--include={','.join(packages)}", *words)


def _run(*words: object) -> None:
    subprocess.run(list(map(str, words)), stdout=sys.stderr, check=True)


def _requirements() -> list[str]:
    """What deploy/docker/install.sh asks pip for, for both images."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (one for extra in ("server", "worker", "vision") for one in project["optional-dependencies"][extra])
    return [*project["dependencies"], *extras, "hatchling"]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


if __name__ == "__main__":
    for name in sys.argv[2:] or _MADE_BY:
        sys.stdout.write(f"{Trees(Path(sys.argv[1])).fetch(name)}\n")
