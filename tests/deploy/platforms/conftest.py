"""The platforms that the same assertions are made about."""

import os
import re
from collections.abc import Iterator

import pytest

from deploy.platforms import engine as engines
from deploy.platforms import kubectl
from deploy.platforms.certificates import ACCESS, Certificates
from deploy.platforms.compose import ComposeRun
from deploy.platforms.engine import Engine
from deploy.platforms.images import build_all
from deploy.platforms.platform import Platform

# Compose's workers have ids of their own making.
_ANY_ID = re.sub(r"^workers = .*", 'workers = ["*"]', ACCESS.read_text(), flags=re.MULTILINE)

PLATFORMS = [
    *(("compose", "compose-tls") if engines.VARIABLE in os.environ else ()),
    *(("cluster-local", "cluster-tls") if kubectl.VARIABLE in os.environ else ()),
]


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    """An engine that has all images of compose.yaml but Grafana's."""
    with engines.engine() as made:
        build_all(made)
        yield made


@pytest.fixture(scope="module", params=PLATFORMS)
def run(request: pytest.FixtureRequest) -> Iterator[Platform]:
    kind, _, form = request.param.partition("-")
    if kind == "cluster":
        with kubectl.cluster_run(form) as cluster:
            yield cluster
        return
    docker: Engine = request.getfixturevalue("docker")
    certificates = Certificates(docker.folder / "tls", _ANY_ID) if form else None
    made = ComposeRun(docker, certificates)
    try:
        made.start()
        yield made
    finally:
        made.close()
