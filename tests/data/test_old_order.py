"""Runs that were begun before `stage.order` existed go on in their order, bit for bit."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.config.root import save_config
from dist_lm.data.infill import Infill, InfillMarks
from dist_lm.data.manifest import Recipe
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import TokenizedDocument
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.registry import load_config

INFILL = Infill(0.5, InfillMarks(251, 252, 253))
FIELDS = ("tokens_BT", "targets_BT", "loss_mask_BT", "document_BT", "position_BT")
# Hashes of 20 steps, made by commit b31cfd03: (corpus, infill, sequences before them).
BEFORE = {
    ("texts", None, 0): "4861ac23ce92e40b800139e8238ab5e249759fd462158c8eb31ca04ed3b2eea5",
    ("texts", None, 132): "f62a481d2883f5489c5ae923edb2e78eb68d9d3af6f380eedfba7770af6386f5",
    ("texts", INFILL, 0): "431008e2b07d4aa293b2b24c1be7a6e8ce774ef09af48637670e84b0613aef18",
    ("texts", INFILL, 132): "15b5ce09ffad69826e71e08b80f3432a2c784b0c138633258563cafd82961691",
    ("chats", None, 0): "e3f9c7dc7f3b48edfe34b1cf6845176bd5379e66e8a5bbaacc58a3b9f0e2afdb",
    ("chats", None, 132): "738d792683be954e997f529728bc2f3e3f5c4e85a296878aface4acc1f54f7f9",
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, half of them of repositories, and conversations with masks: as they were when the hashes were made."""
    folder = tmp_path_factory.mktemp("corpora")
    generator = np.random.default_rng(41)
    for name in ("texts", "chats"):
        with CorpusWriter(folder / name, Recipe("t" * 64, 300, "c" * 64, 8, 1500)) as writer:
            for i, length in enumerate(generator.integers(2, 90, 60).tolist()):
                tokens = generator.integers(2, 250, length).astype(np.uint16)
                tokens[0] = 1
                mask = generator.integers(0, 2, length).astype(np.uint8) if name == "chats" else None
                repository = f"r{i // 5}" if name == "texts" and i > 30 else ""
                language = ("python", "sql")[i % 2]
                writer.write(
                    "train",
                    TokenizedDocument(tokens, 3 * length, language, f"/{i}", "MIT", mask, repository=repository),
                )
            writer.finish({})
    return folder


@pytest.mark.parametrize(("name", "infill", "position"), list(BEFORE))
def test_steps_have_the_bits_of_before(corpora: Path, name: str, infill: Infill | None, position: int) -> None:
    """Finds a change of order, packing or rearranging, with which an old run would read texts twice."""
    corpus = TokenCorpus.open(corpora / name, "train")
    options: dict[str, Any] = {"global_batch": 6, "micro_batch": 3, "dp_rank": 0, "dp_size": 1, "infill": infill}
    digest = hashlib.sha256()
    with SequenceStream(corpus, seed=5, seq_len=64, position=position, **options) as stream:
        for _ in range(20):
            for batch in next(stream).micro_batches:
                for field in FIELDS:
                    digest.update(getattr(batch, field).numpy().tobytes())
    assert digest.hexdigest() == BEFORE[name, infill, position]


def test_a_run_without_the_key_shuffles_documents(tmp_path: Path) -> None:
    """Finds a default that would take an old run to another order."""
    path = tmp_path / "config.yaml"
    save_config(compose_config(["stage=language", "model=nano"]), path)
    lines = path.read_text().splitlines(keepends=True)
    without = [line for line in lines if line.strip() != "order: documents"]
    assert len(without) == len(lines) - 1
    path.write_text("".join(without))
    assert load_config(path).stage.order == "documents"
