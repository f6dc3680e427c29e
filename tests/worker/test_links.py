"""The benchmark of links measures something, on links that are as slow as they say."""

import socket
import threading
import time

import pytest
import torch

from benchmarks.links import in_flight, on_the_wire
from benchmarks.links_proxy import Direction, linked


def test_each_comparison_gives_a_ratio_for_each_pair() -> None:
    gained = in_flight(10_000, 0.001, round_trip_ms=2.0, pairs=2, steps=3)
    halved, in_bytes = (on_the_wire(dtype, 10_000, pairs=1, steps=2) for dtype in (torch.bfloat16, torch.int8))
    assert (len(gained.ratios), len(halved.ratios), len(in_bytes.ratios)) == (2, 1, 1)
    assert all(ratio > 0 for ratio in gained.ratios + halved.ratios + in_bytes.ratios)
    assert " times as fast (" in str(gained)


def test_bytes_arrive_one_after_the_other_and_late() -> None:
    direction, started = Direction(1e6, 0.5), time.monotonic()
    first, second = direction.carry(1000), direction.carry(1000)
    assert second - first == pytest.approx(0.001)
    assert first - started >= 0.501


def test_link_carries_both_ways_whatever_is_sent_until_the_end() -> None:
    sent = bytes(range(256)) * 2000
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                while piece := connection.recv(1 << 16):
                    connection.sendall(piece)

        thread = threading.Thread(target=echo)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with linked(address, megabits_per_second=1000.0, round_trip_ms=1.0) as link:
            host, _, port = link.partition(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        thread.join()
    assert received == sent
