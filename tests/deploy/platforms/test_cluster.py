"""What only a cluster can say: its API server takes every overlay, also one for machines that it does not have."""

import os
from pathlib import Path

import pytest
import yaml

from deploy.kubernetes.rendering import OVERLAYS
from deploy.platforms.kubectl import VARIABLE, namespace, rendered

if VARIABLE not in os.environ:
    pytest.skip("it uses a cluster: `make test-cluster` does", allow_module_level=True)
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_api_server_takes_every_object_that_it_knows(overlay: str, tmp_path: Path) -> None:
    with namespace() as kubectl:
        known = kubectl("api-versions").split()
        objects = [each for each in rendered(overlay, kubectl.namespace, tmp_path) if each["apiVersion"] in known]
        if not objects:
            pytest.skip("the cluster knows no kind of object that is in it: an operator is missing")
        dry = ("apply", "--dry-run=server", "--validate=strict", "--filename=-")
        taken = kubectl(*dry, given=yaml.safe_dump_all(objects))
        assert len(taken.splitlines()) == len(objects), taken
