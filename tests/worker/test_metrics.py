"""What a worker exports of itself: where a step's time goes, what became of its gradients, what failed on the way."""

import math
import socket
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from ormo_protos.refusals import Reason
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import OptionRefused
from ormo_worker.metrics import Exporter, WorkerMetrics
from worker.fake_server import LOST, FakeServer, refuse
from worker.models import line


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


class Scraped:
    """An optimizer with one weight that serves metrics."""

    def __init__(self, server: FakeServer) -> None:
        self.address = free_address()
        self.model = line(weight=2.0)
        self.optimizer = RemoteOptimizer(
            self.model, server.address, worker_id="w7", connect_timeout=5.0, metrics_listen=self.address
        )

    def step(self, gradient: float = 1.0) -> None:
        self.optimizer.zero_grad()
        self.model(torch.tensor([[gradient]])).sum().backward()
        self.optimizer.step()

    def page(self) -> list[str]:
        with urllib.request.urlopen(f"http://{self.address}/metrics") as answer:
            return answer.read().decode().splitlines()

    def value(self, series: str) -> float | None:
        found = [line.rpartition(" ")[2] for line in self.page() if line.rpartition(" ")[0] == series]
        return float(found[0]) if found else None


@pytest.fixture
def scraped(server: FakeServer) -> Iterator[Scraped]:
    made = Scraped(server)
    yield made
    made.optimizer.close()


def test_each_stage_of_each_step_is_timed(scraped: Scraped) -> None:
    for _ in range(3):
        scraped.step()
    counts = {
        stage: scraped.value(f'ormo_worker_step_seconds_count{{stage="{stage}"}}')
        for stage in ("compute", "push", "wait", "pull")
    }
    assert counts == {"compute": 3, "push": 3, "wait": 4, "pull": 4}  # the first parameters need no gradient
    assert scraped.value('ormo_worker_steps_total{outcome="applied"}') == 3
    assert any(
        line.startswith("ormo_worker_process_info{") and 'worker="w7"' in line and 'device="cpu"' in line
        for line in scraped.page()
    )


def test_what_became_of_gradients_is_counted(server: FakeServer, scraped: Scraped) -> None:
    scraped.step(math.nan)
    scraped.step()
    assert scraped.value('ormo_worker_steps_total{outcome="refused"}') == 1
    assert scraped.value('ormo_worker_steps_total{outcome="applied"}') == 1
    assert scraped.value('ormo_worker_steps_total{outcome="discarded"}') == 0


def test_calls_that_are_made_again_are_counted_by_cause_and_so_are_new_joins(
    server: FakeServer, scraped: Scraped
) -> None:
    server.told(("exchange", LOST), ("exchange", LOST), ("exchange", refuse("UNAVAILABLE", Reason.DRAINING)))
    scraped.step()
    assert scraped.value('ormo_worker_retries_total{cause="UNAVAILABLE"}') == 2
    assert scraped.value('ormo_worker_retries_total{cause="DRAINING"}') == 1
    assert scraped.value("ormo_worker_rejoins_total") == 0
    server.told(("exchange", server.forget_workers))
    scraped.step()
    assert scraped.value('ormo_worker_retries_total{cause="NOT_A_MEMBER"}') == 1
    assert scraped.value("ormo_worker_rejoins_total") == 1


def test_the_port_is_free_again_after_the_end_and_without_an_address_there_is_none(server: FakeServer) -> None:
    made = Scraped(server)
    made.optimizer.close()
    made.optimizer.close()
    with pytest.raises(OSError, match="refused"):
        made.page()
    with RemoteOptimizer(line(weight=2.0), server.address, connect_timeout=5.0):
        pass


def test_port_that_is_taken_is_one_sentence_and_nothing_joins(server: FakeServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OptionRefused, match=f"--metrics-listen is {listen}, but nothing can listen there"):
            RemoteOptimizer(line(weight=2.0), server.address, connect_timeout=5.0, metrics_listen=listen)
    assert server.asked == []


def test_free_port_is_chosen_for_port_0() -> None:
    exporter = Exporter("127.0.0.1:0", CollectorRegistry())
    exporter.close()


def test_memory_of_a_gpu_is_read_at_each_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.device] = []

    def allocated(device: torch.device) -> int:
        read.append(device)
        return 1000 * len(read)

    monkeypatch.setattr("ormo_worker.metrics._GPU_MEMORY", {"allocated": allocated})
    metrics = WorkerMetrics("w", torch.device("cuda", 1))
    for expected in (1000, 2000):
        line = f'ormo_worker_gpu_memory_bytes{{kind="allocated"}} {expected}.0'
        assert line in generate_latest(metrics.registry).decode().splitlines()
    assert read == [torch.device("cuda", 1)] * 2
