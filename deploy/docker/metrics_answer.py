"""The health check of all images: exit code 0 if the port for metrics says that the program is alive.

The address is that of ORMO_METRICS_LISTEN; without one there is nothing to ask, and the process being there is all. The
port has no TLS, whatever the others have. Workers and evaluators answer any question with their metrics.
Nothing but the standard library is imported: it runs twice a minute beside a program that computes.
"""

import http.client
import os
import sys

_TIMEOUT_SECONDS = 5.0


def main() -> int:
    """Ask once; returns the exit code."""
    address = os.environ.get("ORMO_METRICS_LISTEN", "")
    if not address:
        return 0
    connection = http.client.HTTPConnection(f"127.0.0.1:{address.rpartition(':')[2]}", timeout=_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/alive")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"no metrics on {address}: {error}\n")
        return 1
    finally:
        connection.close()
    return 0 if status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())
