import threading

import pytest

from ormo_runtime.process import StartedPool


def named(prefix: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]


def test_all_threads_are_there_before_the_first_work() -> None:
    with StartedPool(5, "early") as pool:
        assert len(named("early")) == 5
        for _ in range(20):
            pool.submit(int)
        assert len(named("early")) == 5
    assert not named("early")


def test_each_thread_is_prepared_before_it_works() -> None:
    prepared: list[int] = []
    with StartedPool(3, "ready", lambda: prepared.append(threading.get_ident())) as pool:
        assert pool.submit(threading.get_ident).result() in prepared
    assert len(set(prepared)) == 3


def test_a_pool_that_can_not_be_had_whole_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(named("part")) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        StartedPool(4, "part")
    assert not named("part")
