"""A document that is left out keeps its place, and nothing that is learned depends on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import Batch, SequenceContent, assemble
from dist_lm.data.infill import Infill, InfillMarks
from dist_lm.data.order import DocumentSlice
from dist_lm.data.sequences import CorpusSequences, MixedSequences
from dist_lm.data.without import differing, digest_of, merged, read_ids, text_of
from dist_lm.errors import ArtefactError
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.training.objective import next_token
from tests.data import synthetic_corpus

VOCAB_SIZE, SEQ_LEN = 256, 48
MODEL = ModelConfig(vocab_size=VOCAB_SIZE, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_seq_len=SEQ_LEN)
INFILL = Infill(1.0, InfillMarks(250, 251, 252))


class Written:
    """Documents in memory, as `assemble` reads them."""

    def __init__(self, documents: list[np.ndarray], learned: list[np.ndarray] | None = None) -> None:
        self.documents, self.learned, self.has_mask = documents, learned, learned is not None

    def tokens_of(self, slices: Sequence[DocumentSlice]) -> np.ndarray:
        return np.concatenate([self.documents[document][start:stop] for document, start, stop in slices])

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        assert self.learned is not None
        return self.learned[document][start:stop]


def batch_of(corpus: Written, rows: list[list[DocumentSlice]], without: frozenset[int]) -> Batch:
    contents = [SequenceContent(corpus, slices, without) for slices in rows]
    return assemble(contents, [*range(len(rows))], seq_len=SEQ_LEN, document_mask=True, reset_positions=True)


def documents(seed: int, other: int | None = None) -> list[np.ndarray]:
    """Five documents; `other` is replaced by one of the same length."""
    drawn = [np.random.default_rng([seed, n]).integers(2, 250, 20 + 7 * n) for n in range(5)]
    if other is not None:
        drawn[other] = np.random.default_rng(99).integers(2, 250, len(drawn[other]))
    for tokens in drawn:
        tokens[0] = synthetic_corpus.EOT
    return drawn


ROWS = [
    [DocumentSlice(0, 0, 20), DocumentSlice(1, 0, 27), DocumentSlice(2, 0, 2)],
    [DocumentSlice(2, 2, 34), DocumentSlice(3, 0, 17)],
    [DocumentSlice(3, 17, 41), DocumentSlice(1, 3, 27), DocumentSlice(4, 0, 1)],
]


@pytest.mark.parametrize("is_masked", [False, True], ids=["text", "conversations"])
@pytest.mark.parametrize("document", [1, 3])
def test_gradients_do_not_depend_on_what_the_document_says(document: int, is_masked: bool):
    """Finds a target of the document that counts, one across its end, and attention into it."""
    gradients, losses = [], []
    for replaced in (None, document):
        texts = documents(0, replaced)
        learned = [np.arange(len(text)) % 3 > 0 for text in texts] if is_masked else None
        model = Transformer(MODEL)
        initialise(model, 1)
        batch = batch_of(Written(texts, learned), ROWS, frozenset({document}))
        loss = next_token(0.1, 1e-3)(model, batch)
        loss.total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        losses.append((loss.total.item(), loss.count.item()))
    assert losses[0] == losses[1]
    for left, right in zip(*gradients, strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)


def test_only_targets_behind_its_tokens_are_left_out():
    """Finds a neighbour that loses a target, or one that a piece in the midst of a document gives it: the end-of-text
    that opens a document belongs to the one before."""
    corpus = Written(documents(0))
    plain, without = (batch_of(corpus, ROWS, frozenset(left_out)) for left_out in ((), (1,)))
    assert torch.equal(plain.tokens_BT, without.tokens_BT)
    assert torch.equal(plain.targets_BT, without.targets_BT)
    assert torch.equal(plain.document_BT, without.document_BT)
    removed = (plain.loss_mask_BT - without.loss_mask_BT).nonzero().tolist()
    assert removed == [[0, position] for position in range(20, 47)] + [[2, position] for position in range(23, 48)]


@pytest.mark.parametrize("kind", ["text", "conversations", "infill"])
def test_order_and_content_stay(tmp_path: Path, kind: str):
    """Finds a document left out that moves another one, in text, rows of whole documents and rearranged slices."""
    lengths = synthetic_corpus.lengths(60, 40)
    corpus = synthetic_corpus.corpus(tmp_path / "code", lengths, masked=kind == "conversations")
    infill = INFILL if kind == "infill" else None
    plain = CorpusSequences(corpus, 3, SEQ_LEN, infill=infill)
    without = MixedSequences(corpus, seed=3, seq_len=SEQ_LEN, infill=infill, without={"code": frozenset({7, 20})})
    n_left_out = 0
    for number in range(2 * plain.n_sequences):
        row, other = plain.content(number), without.contents([number])[0]
        assert row.slices == other.slices
        batches = [
            assemble([each], [number], seq_len=SEQ_LEN, document_mask=True, reset_positions=True)
            for each in (row, other)
        ]
        assert torch.equal(batches[0].tokens_BT, batches[1].tokens_BT)
        inside = np.repeat([part.document in (7, 20) for part in row.slices], [p.stop - p.start for p in row.slices])
        inside = torch.from_numpy(np.pad(inside, (0, SEQ_LEN + 1 - len(inside)))[:SEQ_LEN])
        assert torch.equal(batches[0].loss_mask_BT[0].where(~inside, 0), batches[1].loss_mask_BT[0])
        n_left_out += int((batches[0].loss_mask_BT - batches[1].loss_mask_BT).sum())
    # Two epochs read each of the documents, but perhaps for a rest.
    assert n_left_out >= (lengths[7] + lengths[20] if kind != "conversations" else 10)


def test_a_file_of_ids_takes_what_programs_print(tmp_path: Path):
    """Finds a line of `data where --json` that is refused, and equal sets with other names."""
    path = tmp_path / "ids.txt"
    path.write_text('# found by hand\ncode:12\n\n{"corpus": "code-1a2b", "document": 3, "start": 0}\ncode:4\ncode:12\n')
    ids = read_ids(path)
    assert ids == {"code": {4, 12}, "code-1a2b": {3}}
    assert text_of(ids) == "code:4\ncode:12\ncode-1a2b:3\n"
    path.write_text(text_of(ids))
    assert digest_of(read_ids(path)) == digest_of(ids)
    assert merged(ids, {"code": frozenset({5})})["code"] == {4, 5, 12}
    assert differing(ids, {"code": frozenset({4})}) == {"code": {12}, "code-1a2b": {3}}


@pytest.mark.parametrize(
    "line",
    [
        *("", "12", "code:", "code:-1", "code:1.5", ":3", "../code:3", "..:3", "code:" + 30 * "9", "{"),
        *('{"corpus": "code"}', '{"corpus": 1, "document": 2}', '{"corpus": "code", "document": true}'),
    ],
)
def test_a_line_that_is_no_id_is_refused(tmp_path: Path, line: str):
    """Finds a number that is read as something else, and a corpus outside of the work directory."""
    path = tmp_path / "ids.txt"
    path.write_text(f"{line}\n")
    with pytest.raises(ArtefactError, match="names no document" if not line else "line 1: .*expected CORPUS:NUMBER"):
        read_ids(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_ids(path)
    with pytest.raises(ArtefactError, match="/dev/zero: expected a file of ids, not a device"):
        read_ids(Path("/dev/zero"))
