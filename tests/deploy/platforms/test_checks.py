"""Each check finds the fault that it is for, planted here, and nothing where there is none."""

import json
from typing import Any

import pytest

from deploy.platforms.checks import Ending, large_layer, lost, not_json, unclean, unconfined, unhealthy

RECORD = json.dumps({"time": "2026-01-01T00:00:00.000Z", "level": "info", "message": "serving"})
CONFINED: dict[str, Any] = {
    "user": 10001,
    "capabilities": 0,
    "may_gain": False,
    "writable": [],
    "not_writable": [],
    "memory_bytes": 300_000_000,
    "memory_limit_bytes": "1610612736",
    "killed_for_memory": 0,
    "processes_limit": "256",
}


def test_records_are_json_and_no_other_line_is() -> None:
    assert not_json("server", [RECORD, RECORD]) == []
    others = ["serving address=0.0.0.0:50051", '"a text"', '{"message": "no time"}', ""]
    told = [f"server wrote a line that is no record in JSON: {line!r}" for line in others]
    assert not_json("server", [RECORD, *others]) == told


def test_confined_container_is_found_to_be() -> None:
    assert unconfined("worker", CONFINED) == []


@pytest.mark.parametrize(
    ("fact", "value", "sentence"),
    [
        ("user", 0, "worker runs as user 0, and 10001 was expected"),
        ("capabilities", 0xA80425FB, "worker has capabilities 0xa80425fb"),
        ("may_gain", True, "worker may gain rights"),
        ("writable", ["/", "/etc"], "worker can write to /, /etc"),
        ("not_writable", ["/tmp"], "worker can't write to /tmp"),
        ("memory_limit_bytes", "max", "worker has no limit of memory: 'max'"),
        ("memory_limit_bytes", "9223372036854771712", "worker has no limit of memory: '9223372036854771712'"),
        ("memory_bytes", 1_500_000_000, "worker has 1,500,000,000 of 1,610,612,736 bytes of memory"),
        ("killed_for_memory", 2, "worker was killed 2 times for its memory"),
        ("processes_limit", "max", "worker has no limit of processes: 'max'"),
    ],
)
def test_each_fault_of_confinement_is_told(fact: str, value: object, sentence: str) -> None:
    assert unconfined("worker", CONFINED | {fact: value}) == [sentence]


def test_end_is_clean_with_the_code_of_one_and_in_time() -> None:
    assert unclean([Ending("server", 0, 0, 4.0, 90), Ending("worker", 143, 143, 2.0, 30)]) == []
    killed, stubborn = Ending("server", 137, 0, 90.4, 90), Ending("worker", 0, 143, 3.0, 30)
    assert unclean([killed, stubborn]) == [
        "server ended with 137, and 0 was expected",
        "worker ended with 0, and 143 was expected",
        "server ended 90 s after the order, and would have been killed after 90 s",
    ]


def test_sick_container_is_told() -> None:
    assert unhealthy({"server": True, "worker": False}) == ["worker is not healthy"]


def test_fewer_iterations_than_were_seen_are_lost() -> None:
    assert lost(100, 100) == lost(100, 130) == []
    assert lost(100, 99) == ["iteration 100 was there, and now it is 99"]


def test_layer_of_dependencies_is_too_large_for_a_change_of_code() -> None:
    assert large_layer("ormo-server", 5.2e6) == []
    assert large_layer("ormo-server", 987e6) == ["a change of code is 987 MB of ormo-server anew, and 10 are the most"]
