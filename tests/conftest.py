"""Shared by all tests: a small work directory with a tokenizer and corpora, made once."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from dist_lm.chat.documents import encode_document, read_conversation, write_conversation
from dist_lm.chat.messages import Call, Conversation, Message, Tool
from dist_lm.chat.template import layout
from dist_lm.config.corpus import SPLITS, TokenizerConfig
from dist_lm.config.root import Config
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import Document
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards.identity import digest, recipe_of, text_fingerprint
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import FORMAT, Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.cpu_times import CpuTimes
from tests.patience import patient

if TYPE_CHECKING:
    from tests.parallel.ranks import RankGroups

# two threads on two shared cores cost several times the time of one; processes that tests start inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # and this, where a shell started pytest in its background
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

VOCAB_SIZE = 640
TINY_MODEL = (
    f"model.vocab_size={VOCAB_SIZE}",
    "model.d_model=40",
    "model.n_layers=2",
    "model.n_heads=5",  # divides by no number of ranks
    "model.d_ff=80",
    "model.max_seq_len=256",
    # plain initial values, whatever the recipe of nano
    "model.init_std=0.02",
    "model.residual_init=depth",
    "tracking=none",
    "device=cpu",
)
# the same for stages that train on sequences, with plain rates; other stages read no such keys
TINY = (*TINY_MODEL, "stage.rates.embedding=1", "stage.muon.variance_beta=0", "stage.seq_len=32")


def tiny(stage: str) -> tuple[str, ...]:
    """The overrides above that a stage of this package reads."""
    return TINY if stage in ("language", "code", "sft", "tools", "preference", "reward") else TINY_MODEL


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", metavar="FILE", help="append the CPU seconds of each test, with its processes")


@pytest.hookimpl(tryfirst=True)  # pytest-timeout reads its option when it is configured
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("timeout") is None:
        config.option.timeout = patient(float(config.getini("timeout")))
    if path := config.getoption("--cpu-times"):
        config.pluginmanager.register(CpuTimes(Path(path)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collects without the collector of garbage, which took half of the time. Later it passes over what is there."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in ("cluster", "heavy"):
        if item.get_closest_marker(mark) and not _names_mark(item.path, mark):
            raise pytest.UsageError(f"{item.nodeid}: its file has no mark.{mark}, by which launch/test.sh finds it")


@cache
def _names_mark(path: Path, mark: str) -> bool:
    return f"mark.{mark}" in path.read_text()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator["RankGroups"]:
    """Ranks for the tests of a file: started when first asked for, gone at its end."""
    from tests.parallel.ranks import RankGroups  # needs torch, which most tests do without

    groups = RankGroups(tmp_path_factory.mktemp("ranks"))
    yield groups
    groups.close()


TOOL = Tool("to", "d", {"type": "object", "properties": {"x": {"type": "integer"}}})


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose_config(overrides)


def composed(overrides: Sequence[str]) -> Config:
    """`compose_config`, which takes 0.1 s of CPU, once for overrides that differ in their work_dir alone."""
    # Composing reads the size of a tokenizer that is kept: without its work_dir, that of ./work, where one is.
    if "tokenizer=keep" in overrides:
        return compose_config(overrides)
    rest = tuple(override for override in overrides if not override.startswith("work_dir="))
    work_dirs = [override.partition("=")[2] for override in overrides if override not in rest]
    return replace(deepcopy(_composed(rest)), work_dir=work_dirs[-1] if work_dirs else "work")


def texts(language: str, count: int) -> list[Document]:
    """Distinct little programs and sentences, the same at every call."""
    shapes = {
        "english": "The {a} of the {b} is number {i}, said the {a}.\n",
        "python": "def {a}_{i}({b}):\n    return {b} + {i}\n",
        "bash": "#!/bin/bash\necho {a} | grep {b} > out{i}\n",
        "sql": "SELECT {a} FROM {b} WHERE id = {i};\n",
    }
    words = ("value", "name", "count", "total", "index", "result", "table", "line")
    return [
        Document(
            text=shapes[language].format(a=words[i % 8], b=words[(i // 8) % 8], i=i) * (1 + i % 5),
            language=language,
            source=f"{language}:{i}",
            licence="none",
            group=f"{i:064x}",
        )
        for i in range(count)
    ]


def conversations(count: int) -> list[Document]:
    """Distinct requests, most with a call and its result, some without; the same at every call."""
    made = []
    for i in range(count):
        question, call = Message("user", f"{i} in {'kg' if i % 2 else 'g'}" * (1 + i % 3)), Call("to", {"x": i})
        answered = (question, Message("assistant", calls=(call,)), Message("tool", results=(i * 2,)))
        turns = (question,) if i % 3 == 0 else answered
        conversation = Conversation((*turns, Message("assistant", f"It is {i}")), (TOOL,) if len(turns) > 1 else ())
        text = write_conversation(conversation)
        kind = "tools_single" if len(turns) > 1 else "tools_none"
        made.append(Document(text, kind, f"tools:{i}", "none", f"{i:064x}", form="conversation"))
    return made


def layout_text(conversation: Conversation) -> str:
    """A conversation without its marks, so that a small tokenizer knows the words of the layout."""
    return "".join(part.text for part in layout(conversation) if not part.is_mark)


@pytest.fixture(scope="session")
def tiny_work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkDirectory]:
    """work/tokenizer (640 pieces) and work/corpora/{language,code,tools}: do not write to it, copy it."""
    work = WorkDirectory(tmp_path_factory.mktemp("tiny") / "work")
    work.tokenizer.mkdir(parents=True)
    corpora = {
        "language": texts("english", 400),
        "code": [d for language in ("python", "bash", "sql") for d in texts(language, 200)],
    }
    corpora["tools"] = conversations(300)
    everything = [
        layout_text(read_conversation(document.text)) if document.form == "conversation" else document.text
        for documents in corpora.values()
        for document in documents
    ]
    train_tokenizer(everything, work.tokenizer_model, TokenizerConfig(vocab_size=VOCAB_SIZE))
    tokenizer = Tokenizer.load(work.tokenizer_model)
    config = compose_config(["stage=code", *TINY])
    fingerprint = digest(text_fingerprint(config))
    report = {"format": FORMAT, "vocab_size": VOCAB_SIZE, "bytes_per_token": 2.0, "text": fingerprint}
    durable.write_json(work.tokenizer_report, report)
    for name, documents in corpora.items():
        recipe = recipe_of(replace(config, work_dir=str(work.path)), name)
        recipe = replace(recipe, documents_per_member=64, shard_tokens=10_000)
        with CorpusWriter(work.corpus(name), recipe) as writer:
            for number, document in enumerate(documents, len(documents) // 10 - len(documents)):
                writer.write("train" if number < 0 else "val", encode_document(tokenizer, document))
            writer.finish({}, [source.licence for source in config.corpus.corpora[name]])
        for split in SPLITS:  # as the plan of a first command leaves a corpus
            TokenCorpus.open(work.corpus(name), split).check()
    yield work
    assert not (work.path / "runs").exists(), f"a test made a run for all: {list(work.path.glob('runs/*/*'))}"


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    """A work directory of one's own, with the tokenizer and the corpora of `tiny_work`."""
    shutil.copytree(tiny_work.path, tmp_path / "work")
    return WorkDirectory(tmp_path / "work")
