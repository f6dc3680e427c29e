"""Which hosts only this machine reaches: on these alone a server without TLS may listen, and control be open to all."""

import sys

import pytest

from ormo_runtime.tls import host_of, is_loopback

LOOPBACK = ["localhost", "127.0.0.1", "127.0.0.2", "127.255.255.254", "[::1]", "::1", "[0:0:0:0:0:0:0:1]"]
# What no rule here knows for sure to be this machine counts as others': a name may mean anything tomorrow.
NOT_LOOPBACK = [
    "",
    "0.0.0.0",
    "[::]",
    "10.0.0.7",
    "128.0.0.1",
    "192.168.127.1",
    "[2001:db8::1]",
    "[fe80::1]",
    "[::127.0.0.1]",
    "[::ffff:0.0.0.0]",
    "[::ffff:10.0.0.7]",
    "LOCALHOST",
    "localhost.",
    "localhost.example",
    "127.0.0.1.example",
    "example",
    "127.1",
    "2130706433",
    "0x7f000001",
    "127.0.0.01",
    "127.0.0.256",
    " 127.0.0.1",
    "unix",
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_only_this_machine_reaches_these(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", NOT_LOOPBACK)
def test_others_may_reach_these(host: str) -> None:
    assert not is_loopback(host)


def test_a_loopback_written_as_ipv6_is_one_where_python_knows_it() -> None:
    """It is one; Python knows it since 3.13. Before, whoever listens on it is asked for TLS, or --insecure."""
    assert is_loopback("[::ffff:127.0.0.1]") == (sys.version_info >= (3, 13))


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:51234", "10.0.0.7"),
        ("ipv4:127.0.0.1:51234", "127.0.0.1"),
        ("ipv6:%5B::1%5D:51234", "[::1]"),
        ("ipv6:[::1]:51234", "[::1]"),
        ("ipv6:%5B2001:db8::7%5D:51234", "[2001:db8::7]"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:51234", "[::ffff:10.0.0.7]"),
        ("unix:", "unix"),
        ("unix:/run/ormo.socket", "unix"),
        ("vsock:3:51234", "vsock"),
        ("localhost:51234", "localhost"),
        ("ipv4:", ""),
        ("", ""),
    ],
)
def test_the_host_of_a_peer_is_taken_from_what_grpc_calls_it(peer: str, host: str) -> None:
    assert host_of(peer) == host
