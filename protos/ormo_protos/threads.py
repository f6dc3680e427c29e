"""A pool whose threads are all there before they are needed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class StartedPool(ThreadPoolExecutor):
    """A fixed number of threads, which start with the pool.

    By default each starts when it is first needed. Where the system has no more by then, that fails whoever gave the
    work: gRPC's serving thread would end, and with it the serving.

    Args:
        count: of threads.
        name: what theirs begin with.
        prepare: is called by each at its start.

    Raises:
        RuntimeError: the system has not so many; none is left behind.
    """

    def __init__(self, count: int, name: str, prepare: Callable[[], object] | None = None) -> None:
        super().__init__(count, thread_name_prefix=name, initializer=prepare)
        begin = threading.Event()
        try:
            for _ in range(count):
                self.submit(begin.wait)  # keeps its thread busy, so that the next one gets another
        except RuntimeError:
            begin.set()
            self.shutdown()
            raise
        begin.set()
