"""CUDA's streams on the CPU: what is queued is done as late as is allowed, or on one stream at once.

What is not waited for then goes wrong in a test, as it would on a GPU sooner or later.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ormo_worker.pytorch import optimizer as optimizer_module
from ormo_worker.pytorch.devices import Streams
from ormo_worker.pytorch.transfer import Staging

_ATEN = torch.ops.aten
_QUEUED = {
    _ATEN.copy_.default,
    _ATEN.fill_.Scalar,
    _ATEN._foreach_add_.List,
    _ATEN._foreach_copy_.default,
    _ATEN._foreach_zero_.default,
}


class LateStream:
    def __init__(self, lock: Any, *, ahead: bool) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0
        self._lock = lock
        self._ahead = ahead

    def queue(self, work: Callable[[], object]) -> None:
        with self._lock:
            self.work.append(work)
            if self._ahead:
                self.come_to(len(self.work))

    def wait_event(self, event: "LateEvent") -> None:
        self.queue(event.come)

    def come_to(self, end: int) -> None:
        with self._lock, torch.no_grad(), _disable_current_modes():
            while self.done < end:
                self.done += 1
                self.work[self.done - 1]()


class LateEvent:
    def __init__(self, stream: LateStream) -> None:
        self.stream = stream
        self.position = len(stream.work)
        self.waited_for_in: list[str] = []

    def synchronize(self) -> None:
        self.waited_for_in.append(threading.current_thread().name)
        self.come()

    def query(self) -> bool:
        return self.stream.done >= self.position

    def come(self) -> None:
        self.stream.come_to(self.position)


class LateStreams(Streams):
    """The tests' own work is queued, too, in a block of `queueing`.

    Args:
        ahead: the stream that does its work at once; none: all are late.
    """

    def __init__(self, ahead: str = "") -> None:
        lock = threading.RLock()
        self.compute, self.outward, self.inward = (
            LateStream(lock, ahead=ahead == name) for name in ("compute", "outward", "inward")
        )
        self.current = self.compute
        self.events: list[LateEvent] = []
        self.kept: list[Tensor] = []

    def computing(self) -> Any:
        return self.compute

    def mark(self, stream: Any) -> Any:
        self.events.append(LateEvent(stream))
        return self.events[-1]

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def keep(self, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be the streams of all optimizers that are made from now on, as those of a device are."""
        streams = self

        class OnDevice(Staging):
            def __init__(self, *options: Any) -> None:
                super().__init__(*options)
                self.device, self.streams = torch.device("cpu"), streams

        monkeypatch.setattr(optimizer_module, "Staging", OnDevice)

    def queueing(self) -> TorchDispatchMode:
        return _Queueing(self)

    def synchronize(self) -> None:
        for stream in (self.compute, self.outward, self.inward):
            stream.come_to(len(stream.work))


class _Queueing(TorchDispatchMode):
    def __init__(self, streams: LateStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _QUEUED:
            return func(*args, **kwargs)
        self._streams.current.queue(lambda: func(*args, **kwargs))
        return args[0] if func._schema.returns else None
