"""The one place that every call passes before anything else sees it: may this caller call this?"""

from collections.abc import Callable
from typing import Any

import grpc

from ormo_server.core.errors import OrmoError
from ormo_server.security.access import Access
from ormo_server.security.roles import ALLOWED
from ormo_server.service.errors import Refuser, refuse
from ormo_server.service.rewrapping import behaviour_of, rewrapped


class Guard(grpc.ServerInterceptor):
    """Lets callers call what one of their roles allows.

    Args:
        access: knows callers.
        refuser: is told of each refusal.
    """

    def __init__(self, access: Access, refuser: Refuser) -> None:
        self._access = access
        self._refuser = refuser

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        """See `grpc.ServerInterceptor`."""
        handler = continuation(details)
        if handler is None:
            return None
        method, behaviour = details.method, behaviour_of(handler)
        allowed = ALLOWED.get(method, frozenset())

        def guarded(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
            try:
                self._access.caller(context).check_may_call(method, allowed)
            except OrmoError as error:
                refuse(self._refuser, context, error)
            return behaviour(request, context, *more)

        return rewrapped(handler, guarded)
