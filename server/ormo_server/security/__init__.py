"""Who may do what: TLS, the list of callers, and their roles. `service/guard.py` goes by it at every call."""

from ormo_server.security.access import Access, AccessError, ListedAccess, OpenAccess
from ormo_server.security.callers import Caller
from ormo_server.security.loopback import is_loopback
from ormo_server.security.tls import server_credentials

__all__ = [
    "Access",
    "AccessError",
    "Caller",
    "ListedAccess",
    "OpenAccess",
    "is_loopback",
    "server_credentials",
]
