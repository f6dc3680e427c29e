"""How long the search for a token takes says nothing of it: every line is compared, each in constant time."""

import hmac
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from ormo_runtime.tls import AUTHORIZATION, BEARER
from ormo_server import security
from ormo_server.core.errors import Unauthenticated
from ormo_server.security import ListedAccess
from security.authority import line

TOKENS = [f"{letter}-token-of-at-least-32-characters" for letter in "abc"]
NAMES = ["first", "second", "third"]
# A line for a certificate is compared, too; it comes in the middle.
LINES = [line("reader", name, token) for name, token in zip(NAMES, TOKENS, strict=True)]
LINES.insert(1, '[[allow]]\nrole = "admin"\ncertificate = "operator"\n')


class Bringing:
    """The part of a call's context that says what token came with it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [(AUTHORIZATION, f"{BEARER}{self._token}")]

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What is compared in constant time from now on."""
    pairs: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        pairs.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(security, "hmac", SimpleNamespace(compare_digest=compare))
    return pairs


def name_of(listed: ListedAccess, token: str) -> str | None:
    context: grpc.ServicerContext = Bringing(token)  # type: ignore[assignment]
    try:
        return listed.caller(context).name
    except Unauthenticated:
        return None


BROUGHT = dict(zip(TOKENS, NAMES, strict=True)) | {
    "d-token-of-at-least-32-characters": None,
    TOKENS[0][:-1]: None,
    TOKENS[0] + "x": None,
    "x": None,
    "": None,
    "ä" * 1000: None,
}


@pytest.mark.parametrize("token", BROUGHT)
def test_every_line_is_compared_in_constant_time_whatever_the_token(
    token: str, tmp_path: Path, compared: list[tuple[bytes, bytes]]
) -> None:
    path = tmp_path / "access.toml"
    path.write_text("\n".join(LINES))
    listed = ListedAccess(path)
    assert name_of(listed, token) == BROUGHT[token]
    assert len(compared) == len(LINES)
    brought, known = {one for one, _ in compared}, [other for _, other in compared if other]
    assert len(brought) == 1, "one digest, of what came"
    assert {len(digest) for digest in [*brought, *known]} == {32}, "of one length, so that none says how long it is"
    assert len(set(known)) == len(TOKENS)
