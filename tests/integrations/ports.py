"""Ports for programs that must be told theirs."""

import contextlib
import socket


def free_ports(count: int) -> list[int]:
    """Ports that nobody has at the moment, on any address."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
