"""Fuzzed bytes, read as decisions."""


class Script:
    """Bytes, taken one after the other; zeros where there are none left."""

    def __init__(self, fuzzed: bytes) -> None:
        self._fuzzed, self._at = fuzzed, 0

    @property
    def over(self) -> bool:
        """Whether none are left."""
        return self._at >= len(self._fuzzed)

    def take(self, size: int) -> bytes:
        """The next bytes."""
        taken = self._fuzzed[self._at : self._at + size]
        self._at += size
        return taken + bytes(size - len(taken))

    def number(self, size: int = 1, *, signed: bool = False) -> int:
        """A number of so many bytes."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._fuzzed) - self._at) if not self.over else b""
