"""What the server's metrics tell that its status does not."""

import http.client
import re

_SECONDS = 5.0
# Not `PullParams`, which is the evaluator's.
_MOVED = re.compile(r'^ormo_(?:received|sent)_bytes_total\{method="(?:PushPull|PushGradient)"\} (\S+)$', re.MULTILINE)
_DELAYS = re.compile(r'^ormo_gradient_delay_iterations_bucket\{le="(\S+)"\} (\S+)$', re.MULTILINE)


def metrics_page(address: str) -> str:
    """The metrics as text; empty if they can't be had."""
    connection = http.client.HTTPConnection(address, timeout=_SECONDS)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, ValueError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def bytes_moved(page: str) -> int | None:
    """Tensor bytes between the workers and the server so far, both ways; None if the page does not tell."""
    found = _MOVED.findall(page)
    return sum(int(float(number)) for number in found) if found else None


def delays_of(page: str) -> dict[int, int]:
    """How many gradients were counted with each delay; the metric counts larger ones in groups, by their largest."""
    found: dict[int, int] = {}
    bound, below = -1, 0
    for upper, number in _DELAYS.findall(page):
        bound = bound + 1 if upper == "+Inf" else int(float(upper))
        if int(float(number)) > below:
            found[bound] = int(float(number)) - below
        below = int(float(number))
    return found
