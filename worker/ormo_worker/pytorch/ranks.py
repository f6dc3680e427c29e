"""The processes that together are one worker: a process group of torch, whose rank 0 speaks with the server.

What they tell each other goes through a group of gloo's of their own: its messages are on the CPU, where nobody waits
for what a GPU has still to do, and never stand among those of the program. Tensors on GPUs go through the group that
was given, by NCCL.
"""

import contextlib
import gc
import logging
import pickle
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ormo_worker.errors import GroupBroken, OptionRefused

_LOG = logging.getLogger(__name__)
A = TypeVar("A")

# Nearly all messages fit into it, and so go out in one piece: what an exchange gave takes some 600 bytes.
_HEAD_BYTES = 2048
_LENGTH_BYTES = 8
# How often ranks that wait for the server with rank 0 hear from it: only then do they see signals, too.
_PULSE_SECONDS = 5.0
_SHOWN_CHARACTERS = 200
_WAIT = b""
# Groups of gloo's by those that they were made for. Never destroyed by us: another one for the same ranks would get the
# same name, and find the old one's addresses in the store.
_companions: dict[Any, Any] = {}


class Ranks:
    """One rank's view of the others.

    Args:
        group: all of them; each has to make this at the same point of its program.

    Attributes:
        number: this rank's in the group; 0 speaks with the server.
        size: how many there are.
        give_up: called, in rank 0, when another rank is found to be gone: also from a thread of its own, while the
            program's waits for the server.

    Raises:
        GroupBroken: another rank does not answer.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.number = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.give_up: Callable[[], None] = lambda: None
        self._group = group
        self._timeout = _timeout_of(group)
        self._root = dist.get_process_group_ranks(group)[0]
        with self._errors():
            self._host = _companion_of(group, self._timeout)
        self._lock = threading.Lock()  # held by who sends: rank 0's two threads
        self._waits = False
        self._failure: GroupBroken | None = None
        self._closed = threading.Event()
        self._pulse: threading.Thread | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that speaks with the server."""
        return self.number == 0

    def reaches(self, device: torch.device) -> bool:
        """Whether tensors there go from rank to rank without a copy in the memory of the host."""
        return device.type != "cpu" and f"{device.type}:nccl" in dist.get_backend_config(self._group).split(",")

    def open(self) -> None:
        """Begin to keep the others' hopes up, in rank 0, whenever it waits for the server."""
        if self.leads:
            self._closed.clear()
            self._pulse = threading.Thread(target=self._beat, name="ormo-pulse", daemon=True)
            self._pulse.start()

    def close(self) -> None:
        """End the thread; may be called again, from any thread. Others are not told."""
        self._closed.set()
        if self._pulse is not None and self._pulse is not threading.current_thread():
            self._pulse.join()
            self._pulse = None

    def gather(self, row: bytes) -> list[bytes]:
        """What each rank has said here, in their order; all say as many bytes.

        Raises:
            GroupBroken: a rank is gone, or did not come here in time.
        """
        own = torch.frombuffer(bytearray(row), dtype=torch.uint8)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with self._errors():
            dist.all_gather(rows, own, group=self._host)
        return [bytes(each.tolist()) for each in rows]

    def tell(self, message: object) -> None:
        """Say something to all others, which `hear` it; for rank 0.

        Raises:
            GroupBroken: as for `gather`.
        """
        with self._lock:
            self._send(pickle.dumps(message))

    def hear(self) -> Any:
        """What rank 0 `tell`s.

        Raises:
            GroupBroken: as for `gather`.
        """
        while (data := self._receive()) == _WAIT:
            pass
        return pickle.loads(data)  # noqa: S301 - of a process of the same program, which has all that this one has

    def while_waiting(self, work: Callable[[], A]) -> A:
        """Do what may take longer than the others would wait for a word; for rank 0, before it tells what came of it.

        Raises:
            GroupBroken: another rank was gone meanwhile.
            Exception: whatever `work` raises.
        """
        with self._lock:
            self._waits = True
        try:
            return work()
        finally:
            with self._lock:
                self._waits = False
            if self._failure is not None:
                raise self._failure

    def broadcast(self, tensor: Tensor) -> None:
        """Give all ranks what rank 0 has in this tensor, which is contiguous.

        On a GPU it is queued on the current stream, and nobody waits.

        Raises:
            GroupBroken: as for `gather`.
        """
        with self._errors():
            if tensor.device.type == "cpu":
                dist.broadcast(tensor, self._root, group=self._host)
            elif self.reaches(tensor.device):
                dist.broadcast(tensor, self._root, group=self._group)
            else:
                here = tensor.cpu()
                dist.broadcast(here, self._root, group=self._host)
                tensor.copy_(here)

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks what rank 0 has in these: in one piece for each device, for most are small.

        Raises:
            GroupBroken: as for `gather`.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor)
        for alike in by_device.values():
            packed = torch.cat([each.detach().contiguous().flatten().view(torch.uint8) for each in alike])
            self.broadcast(packed)
            if not self.leads:
                for each, part in zip(alike, torch.split(packed, [each.nbytes for each in alike]), strict=True):
                    each.copy_(part.clone().view(each.dtype).view(each.shape))  # cloned: a view must begin at a whole

    def mean(self, value: Tensor) -> Tensor:
        """The mean of all ranks' numbers; on a GPU that the group reaches, where nobody waits for it."""
        total = value.detach().float().clone()
        with self._errors():
            dist.all_reduce(total, group=self._group)
        return total / self.size

    def _beat(self) -> None:
        while not self._closed.wait(min(_PULSE_SECONDS, self._timeout.total_seconds() / 4)):
            with self._lock:
                if not self._waits or self._failure is not None:
                    continue
                try:
                    self._send(_WAIT)
                except GroupBroken as error:
                    self._failure = error

    def _send(self, data: bytes) -> None:
        framed = len(data).to_bytes(_LENGTH_BYTES) + data
        head, rest = framed[:_HEAD_BYTES].ljust(_HEAD_BYTES, b"\0"), framed[_HEAD_BYTES:]
        self.broadcast(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        if rest:
            self.broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def _receive(self) -> bytes:
        head = torch.empty(_HEAD_BYTES, dtype=torch.uint8, device="cpu")
        self.broadcast(head)
        framed = head.numpy().tobytes()
        end = _LENGTH_BYTES + int.from_bytes(framed[:_LENGTH_BYTES])
        if end > _HEAD_BYTES:
            rest = torch.empty(end - _HEAD_BYTES, dtype=torch.uint8, device="cpu")
            self.broadcast(rest)
            framed += rest.numpy().tobytes()
        return framed[_LENGTH_BYTES:end]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # what each backend raises, and torch for a group that is destroyed
            self.give_up()
            raise broken(self.number, self.size, error) from error


def broken(rank: int, ranks: int, error: Exception) -> GroupBroken:
    """What a rank says when a call that needs the others has failed."""
    said = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
    return GroupBroken(
        f"rank {rank} of the {ranks} that are this worker can't go on without the others ({said}): one of them has "
        "ended, or did not come to this step within the group's timeout. See which rank's log ends first, and start "
        "all of them again; the run goes on meanwhile"
    )


def _timeout_of(group: Any) -> timedelta:
    """The one that the group was made with; there is no public way to ask for it."""
    devices = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
    backend = group._get_backend(torch.device(devices[0]))  # noqa: SLF001
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else dist.default_pg_timeout


def _companion_of(group: Any, timeout: timedelta) -> Any:
    if group not in _companions:
        ranks = dist.get_process_group_ranks(group)
        _companions[group] = dist.new_group(ranks, timeout, backend="gloo", use_local_synchronization=True)
    return _companions[group]


def ranks_of(group: object) -> Ranks | None:
    """The other ranks of a worker; None for one that is a process by itself.

    Raises:
        OptionRefused: it is no process group, or this process is not in it.
        GroupBroken: another rank does not answer.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise OptionRefused(
            f"process_group is {group!r}: expected the process group whose ranks are this worker, such as "
            "torch.distributed.group.WORLD after torch.distributed.init_process_group()"
        )
    return Ranks(group) if dist.get_world_size(group) > 1 else None


def refuse_silent_group(parameters: Collection[Tensor]) -> None:
    """The ranks of a model in DistributedDataParallel all have one gradient: as many workers, they would all push it.

    Rank 0 is only warned: a program may well have it push alone, and give the others what comes by itself.

    Looks at all objects there are, where torch's processes have joined one another, and at none elsewhere: a trainer
    may have wrapped the model, and a plain one does not show it.

    Args:
        parameters: the model's.

    Raises:
        OptionRefused: they are in one, and this is not its rank 0.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    own = set(parameters)
    if _reducing(own) is None:
        return
    gc.collect()  # one that nobody has any more may just not have been collected yet
    group = _reducing(own)
    if group is None:
        return
    rank, said = dist.get_rank(group), _SILENT.format(size=dist.get_world_size(group))
    if rank:
        raise OptionRefused(f"{said} (this is rank {rank})")
    _LOG.warning("%s; this is rank 0, which may push alone if the others make no RemoteOptimizer", said)


_SILENT = (
    "the model is in a DistributedDataParallel of {size} ranks, which have the same gradient, and each of them would "
    "push it: say that these ranks are one worker, in all of them, with process_group= of RemoteOptimizer, such as "
    "process_group=torch.distributed.group.WORLD"
)


def _reducing(own: set[Tensor]) -> Any:
    """The group that reduces these parameters' gradients; None if there is none of several ranks."""
    for each in gc.get_objects():
        # By its type: some objects make something up when they are asked for their class.
        if issubclass(type(each), DistributedDataParallel) and "process_group" in vars(each):
            group = each.process_group
            if dist.get_world_size(group) > 1 and not own.isdisjoint(each.parameters()):
                return group
    return None


_ROW = struct.Struct("<Bq?ddd")


@dataclass(frozen=True, slots=True)
class Row:
    """What each rank says before the ranks do something together.

    Attributes:
        act: the number of what it is about to do.
        samples: of its mini-batch.
        loss: the mini-batch's mean; None if it is not known here.
        gradient_sum, gradient_norm: of all gradients; the same in all ranks, if they have been reduced.
    """

    act: int
    samples: int = 0
    loss: float | None = None
    gradient_sum: float = 0.0
    gradient_norm: float = 0.0

    def to_bytes(self) -> bytes:
        """As `of` reads it."""
        known = self.loss is not None
        return _ROW.pack(self.act, self.samples, known, self.loss or 0.0, self.gradient_sum, self.gradient_norm)

    @classmethod
    def of(cls, data: bytes) -> "Row":
        """Read what `to_bytes` has written."""
        act, samples, known, loss, *gradient = _ROW.unpack(data)
        return cls(act, samples, loss if known else None, *gradient)
