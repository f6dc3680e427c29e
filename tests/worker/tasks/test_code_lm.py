import logging
import math
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ormo_worker.tasks import Score, TaskError
from ormo_worker.tasks.batches import batches, evaluation_batches
from ormo_worker.tasks.code_lm import HELD_BACK, SYMBOLS, TRAINED_ON, CodeLm, Windows, digest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two that wait for each other are many times slower where other programs want the processor as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> CodeLm:
    return CodeLm()


def as_text(windows: torch.Tensor) -> str:
    return "".join(map(chr, windows.flatten().tolist()))


def test_whole_modules_are_held_back_and_no_module_is_named_twice() -> None:
    every = f"{TRAINED_ON} {HELD_BACK}".split()
    assert len(set(every)) == len(every)


def test_the_test_set_is_the_source_of_modules_that_are_not_trained_on(task: CodeLm) -> None:
    samples = task.test_set()
    source = Path(sysconfig.get_path("stdlib"), "calendar.py").read_text(encoding="utf-8")
    assert as_text(samples[0]) == source[:65]
    assert 1_000 < len(samples) < 3_000  # type: ignore[arg-type]  # the evaluator's time: a second or so
    assert len(task.train_set()) > 50_000  # type: ignore[arg-type]


def test_samples_predict_each_character_of_the_text_once() -> None:
    text = "".join(chr(32 + number % 90) for number in range(300))
    windows = Windows(text)
    predicted = [window[1:] for window in (windows[0], windows[1], windows[2], windows[3])]
    assert as_text(torch.stack(predicted)) == text[1:257]
    assert len(windows) == 4


def test_what_is_not_ascii_is_one_symbol_wherever_it_comes_from() -> None:
    sample = Windows("aé漢😀" + "b" * 61)[0]
    assert sample[:5].tolist() == [97, 127, 127, 127, 98]
    assert sample.dtype == torch.int64
    assert int(sample.max()) < SYMBOLS


def test_a_batch_is_its_samples_stacked(task: CodeLm) -> None:
    windows = task.test_set()
    assert isinstance(windows, Windows)
    assert torch.equal(windows.batch_at(torch.tensor([5, 2])), torch.stack([windows[5], windows[2]]))


def test_no_output_of_the_model_depends_on_what_follows(task: CodeLm) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    one = torch.randint(SYMBOLS, (1, 64))
    other = one.clone()
    other[0, 40:] = (other[0, 40:] + 1) % SYMBOLS
    torch.testing.assert_close(model(one)[:, :40], model(other)[:, :40])
    assert not torch.allclose(model(one)[:, 40:], model(other)[:, 40:])


def test_a_score_counts_characters_and_its_mean_is_the_loss(task: CodeLm) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    batch = next(evaluation_batches(task.test_set(), 8))
    score = task.score(model, batch)
    assert score.samples == 8 * 64
    assert score.mean_loss == pytest.approx(task.loss(model, batch).item(), rel=1e-5)
    assert score.mean_loss == pytest.approx(math.log(SYMBOLS), rel=0.1)  # it guesses
    guessed = model(batch[:, :-1]).argmax(dim=2)
    assert score.correct == (guessed == batch[:, 1:]).sum()


def test_the_start_tells_which_text_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ormo_worker"):
        CodeLm()
    held_back = [Path(sysconfig.get_path("stdlib"), f"{module}.py") for module in HELD_BACK.split()]
    text = "\n".join(file.read_text(encoding="utf-8") for file in held_back)
    assert f"Python {platform.python_version()}" in caplog.text
    assert f"{len(text):,} to test (digest {digest(text)})" in caplog.text


def test_a_python_without_its_sources_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(TaskError, match=r"code-lm reads the sources.*_collections_abc\.py is not there: install"):
        CodeLm()


def test_norms_are_not_decayed_and_matrices_are(task: CodeLm) -> None:
    scales = {name: task.weight_decay_scale(name, each) for name, each in task.build_model().named_parameters()}
    assert (scales["norm.weight"], scales["head.weight"], scales["symbols.weight"]) == (0, 1, 1)


def test_150_steps_of_adam_learn_about_as_much_as_pairs_of_characters_tell(task: CodeLm) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, batch in zip(range(150), batches(task.train_set(), 32, seed=0), strict=False):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    scores = (task.score(model, batch) for batch in evaluation_batches(task.test_set(), 100, samples=300))
    # By its frequencies in this very text, a character costs 3.12 nats, and one after another 2.33.
    assert sum(scores, Score()).mean_loss < 2.4
