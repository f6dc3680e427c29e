"""The ordered-momentum parameter server: a pure core and the shells that drive it.

`local` starts a server from Python, for notebooks and tests.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for those who read the code without running it
    from ormo_server.from_python import LocalServer as LocalServer
    from ormo_server.from_python import local as local

__all__ = ["LocalServer", "local"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ormo_server' has no attribute {name!r}")
    from ormo_server import from_python  # when it is first used: importing the package costs nothing

    return getattr(from_python, name)
