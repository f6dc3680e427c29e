"""What the workers of `diary_task` were told, held against the model."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import load_file


class Diaries:
    """Of the workers NAME-0, NAME-1 and so on.

    Args:
        folder: that they are in.
        name: of the workers, without their numbers.
        run: the server's directory.
    """

    def __init__(self, folder: Path, name: str, run: Path) -> None:
        self._folder = folder
        self._name = name
        self._run = run

    def acknowledged(self, number: int) -> list[int]:
        """The iterations at which a worker was told that a gradient of its own was applied."""
        diary = self._folder / f"{self._name}-{number}.diary"
        return [int(line) for line in diary.read_text().splitlines()] if diary.exists() else []

    def longer(self, more: int, numbers: Iterable[int]) -> Callable[[], bool]:
        """Whether each of these workers was told so many more times than now."""
        wanted = {number: len(self.acknowledged(number)) + more for number in numbers}
        return lambda: all(len(self.acknowledged(number)) >= count for number, count in wanted.items())

    def counts(self) -> list[int]:
        """How often each worker's gradient is in the newest checkpoint."""
        weight = load_file(self._run / "latest" / "model.safetensors")["weight"]
        return [-round(value) for value in weight.tolist()]

    def assert_counted_once(self, workers: range, interrupted: int) -> None:
        """All that was acknowledged is in the model, once; and besides only what was under way as one ended."""
        told = {number: self.acknowledged(number) for number in workers}
        twice = [at for at, count in Counter(at for each in told.values() for at in each).items() if count > 1]
        assert twice == []  # what was lost would have its number given out again
        counts = self.counts()
        assert sum(counts) == sum(counts[: len(workers)])
        missing = [counts[number] - len(told[number]) for number in workers]
        assert min(missing) >= 0
        assert sum(missing) <= interrupted
