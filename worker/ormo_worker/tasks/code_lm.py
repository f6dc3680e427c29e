"""The task `code-lm`: a small transformer that continues Python source, on what every Python has with it."""

import hashlib
import logging
import platform
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ormo_worker.tasks import Batch, Score, Task, TaskError

_LOG = logging.getLogger(__name__)

# Of the standard library of Python 3.11 and all later ones. By name, and not what is there: which modules are held back
# must not depend on what a distribution leaves out.
TRAINED_ON = """
    _collections_abc _pydecimal _pyio _strptime abc argparse ast asyncio.base_events asyncio.events
    asyncio.futures asyncio.locks asyncio.queues asyncio.selector_events asyncio.sslproto asyncio.streams
    asyncio.subprocess asyncio.tasks asyncio.unix_events base64 bdb bisect bz2 cmd code codecs collections
    compileall concurrent.futures._base concurrent.futures.process concurrent.futures.thread configparser copy
    copyreg csv dataclasses datetime difflib dis doctest email._header_value_parser email._parseaddr
    email._policybase email.charset email.contentmanager email.feedparser email.generator email.header
    email.headerregistry email.message email.utils enum filecmp fileinput fnmatch fractions ftplib functools
    getopt getpass gettext glob graphlib heapq html.parser http.client http.cookiejar http.cookies http.server
    imaplib inspect ipaddress json.decoder json.encoder keyword linecache locale logging logging.config
    logging.handlers lzma mailbox mimetypes modulefinder multiprocessing.connection multiprocessing.context
    multiprocessing.managers multiprocessing.pool multiprocessing.queues multiprocessing.shared_memory
    multiprocessing.synchronize netrc ntpath numbers opcode operator optparse os pdb pickle pickletools pkgutil
    platform plistlib poplib posixpath pprint profile pstats pyclbr pydoc queue quopri reprlib rlcompleter runpy
    sched selectors shelve shlex shutil smtplib socket socketserver ssl stat statistics stringprep subprocess
    symtable sysconfig tabnanny tarfile textwrap threading timeit tokenize trace traceback tracemalloc types
    typing unittest.case unittest.loader unittest.main unittest.mock unittest.result unittest.runner
    unittest.suite urllib.error urllib.parse urllib.request urllib.robotparser uuid warnings wave weakref
    webbrowser xml.dom.expatbuilder xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax.expatreader
    xml.sax.handler xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile zipimport
"""
HELD_BACK = "calendar contextlib gzip random"

SYMBOLS = 128
_OTHER = 127  # the control character DEL, which no source has, stands for all that is not ASCII
_CONTEXT = 64
_CHANNELS, _HEADS, _BLOCKS = 96, 4, 2


class CodeLm(Task):
    """Characters of the standard library of the Python that runs it, by their predecessors: `data_dir` is not used.

    A sample is 65 characters, as int64 from 0 to 127, of which the last 64 are predicted; what is not ASCII is one
    symbol, so that the model's shapes are the same with every Python. The loss is in nats per character.

    Raises:
        TaskError: this Python comes without the sources of its library.
    """

    def __init__(self, *, data_dir: Path | None = None) -> None:
        super().__init__(data_dir=data_dir)
        self._trained_on, self._held_back = _text_of(TRAINED_ON), _text_of(HELD_BACK)
        # Workers with other versions of Python have other texts, and losses on them can't be compared.
        _LOG.info(
            "code-lm: the standard library of Python %s: %s characters to train (digest %s), %s to test (digest %s)",
            platform.python_version(),
            f"{len(self._trained_on):,}",
            digest(self._trained_on),
            f"{len(self._held_back):,}",
            digest(self._held_back),
        )

    def build_model(self) -> nn.Module:
        """Make a transformer of 252,864 parameters: two blocks of 96 channels."""
        return Transformer(SYMBOLS, _CONTEXT, _CHANNELS, _HEADS, _BLOCKS)

    def train_set(self) -> Dataset[Any]:
        """Windows of the modules that are trained on; they share no predicted character."""
        return Windows(self._trained_on)

    def test_set(self) -> Dataset[Any]:
        """Windows of other modules."""
        return Windows(self._held_back)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross entropy per character."""
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Score:
        """Score the batch, with each of its characters as a sample."""
        logits, wanted = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        return Score(
            loss_sum=F.cross_entropy(logits, wanted, reduction="sum").item(),
            correct=int((logits.argmax(dim=1) == wanted).sum().item()),
            samples=len(wanted),
        )

    def weight_decay_scale(self, name: str, parameter: nn.Parameter) -> float:  # noqa: ARG002 - the task's contract
        """None for norms, as is usual for transformers."""
        return 0.0 if parameter.ndim == 1 else 1.0


class Windows(Dataset[Tensor]):
    """A text cut into samples of `_CONTEXT` + 1 characters, each of which begins with the last one's end.

    Args:
        text: of at least one sample.
    """

    def __init__(self, text: str) -> None:
        codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32).clamp_(max=_OTHER)
        self._windows = codes.to(torch.uint8).unfold(0, _CONTEXT + 1, _CONTEXT)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[index].long()

    def batch_at(self, indices: Tensor) -> Tensor:
        """The samples at the indices, shape (N, 65), int64."""
        return self._windows[indices].long()


class Transformer(nn.Module):
    """A decoder-only transformer with learnt positions (Vaswani et al. 2017, as Radford et al. 2019 order its parts).

    Takes int64 symbols of shape (N, T); gives logits of shape (N, T, symbols) for the symbol that follows each.

    Args:
        symbols: how many there are.
        context: the largest T.
        channels: of features; a multiple of `heads`.
        heads: of attention.
        blocks: how many.
    """

    def __init__(self, symbols: int, context: int, channels: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, channels)
        self.positions = nn.Embedding(context, channels)
        self.blocks = nn.Sequential(*(_Block(channels, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, symbols, bias=False)
        for embedding in (self.symbols, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        """The logits."""
        positions = torch.arange(symbols.shape[1], device=symbols.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.symbols(symbols) + self.positions(positions))))
        return logits


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = nn.Linear(channels, 3 * channels, bias=False)
        self.attended = nn.Linear(channels, channels, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels, bias=False),
            nn.GELU("tanh"),
            nn.Linear(4 * channels, channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (N, T, channels)."""
        # Heads before positions: (N, heads, T, channels / heads).
        parts = self.attention(self.attention_norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind()
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


def digest(text: str) -> str:
    """The first 16 characters of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text_of(modules: str) -> str:
    return "\n".join(map(_source, modules.split()))


def _source(module: str) -> str:
    # Not by importing it, which may do anything; a module of one version is a package in another.
    path = Path(sysconfig.get_path("stdlib"), *module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise TaskError(
        f"the task code-lm reads the sources of Python's standard library, and {path}.py is not there: install the "
        "whole library (Debian: libpython3-stdlib), or use a Python that has it"
    )
