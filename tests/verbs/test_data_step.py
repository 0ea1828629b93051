"""The documents of a step are those that its ranks read, with their own sources and licences."""

import io
import json

import numpy as np
import pytest

from dist_lm.data.shard_writer import read_origins
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.stages.registry import load_config
from dist_lm.stages.text import sequence_options
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.readable import OutputConsole
from dist_lm.verbs.data_step import UsedSlice, origins_of, print_step, slices_of_step
from tests.training_run import prepare

RANKS = {"micro_batch": 8, "global_batch": 8, "dp_rank": 0, "dp_size": 1}
SEQ_LEN = 64
STEP = 40  # in the second epoch of the small corpora


def row_of(run: RunDirectory, used: list[UsedSlice], sequence: int) -> np.ndarray:
    """The tokens of a sequence as its slices stand in the corpora."""
    corpora = {part.corpus: TokenCorpus.open(run.work.corpus(part.corpus), "train") for part in used}
    return np.concatenate(
        [
            corpora[part.corpus].tokens(part.document, part.start, part.stop)
            for part in used
            if part.sequence == sequence
        ]
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("language", ()),
        ("code", ("stage.mix={language: 0.25}",)),
        ("code", ("stage.phases=[{until: 30, mix: {code: 1}}, {mix: {code: 1, language: 2}}]",)),
        ("tools", ()),
    ],
)
def test_slices_are_what_the_ranks_of_a_step_read(work: WorkDirectory, stage: str, settings: tuple[str, ...]):
    """Finds a step off by one, a corpus of the mix or an epoch that is looked up in another order."""
    steps = ("stage.steps=100", f"stage.seq_len={SEQ_LEN}", "stage.init_from=none")
    run = prepare(work, "looked_up", *steps, *settings, stage=stage)
    used = slices_of_step(run, STEP)

    config, tokenizer = load_config(run.config), Tokenizer.load(work.tokenizer_model)
    options = sequence_options(config, run, tokenizer)
    with SequenceStream(
        **options, **RANKS, seq_len=SEQ_LEN, position=(STEP - 1) * 8, pad_id=tokenizer.pad_id
    ) as stream:
        (batch,) = next(stream).micro_batches
    assert sorted({part.sequence for part in used}) == batch.sequence_B.tolist()
    for row, sequence in enumerate(batch.sequence_B.tolist()):
        tokens = row_of(run, used, sequence)
        n_inputs = len(tokens) - 1
        assert batch.tokens_BT[row, :n_inputs].tolist() == tokens[:-1].tolist()
        assert batch.targets_BT[row, :n_inputs].tolist() == tokens[1:].tolist()
        assert (batch.tokens_BT[row, n_inputs + 1 :] == tokenizer.pad_id).all()


@pytest.mark.heavy
def test_rearranged_slices_are_shown_as_they_stand_in_their_documents(work: WorkDirectory):
    """Finds the marks of fill-in-the-middle counted as tokens of a document."""
    run = prepare(work, "infill", "stage.steps=9", "stage.init_from=none", "stage.fim_rate=1.0", stage="code")
    used = slices_of_step(run, 9)
    assert all(0 <= part.start < part.stop <= part.document_tokens for part in used)
    lengths = {len(row_of(run, used, sequence)) for sequence in {part.sequence for part in used}}
    assert len(lengths) == 1


def test_origins_are_those_beside_the_tars(work: WorkDirectory):
    """Finds a document that gets the source of a neighbour, or of another tar."""
    corpus = TokenCorpus.open(work.corpus("code"), "train")
    everything = [origin for tar in sorted(corpus.directory.glob("train-*.tar")) for origin in read_origins(tar)]
    assert len(everything) == corpus.n_documents
    documents = [0, 1, 17, corpus.n_documents - 1]
    assert origins_of(corpus, documents) == {document: everything[document] for document in documents}


@pytest.mark.heavy
def test_a_step_that_is_none_and_a_corpus_that_has_changed_are_refused(work: WorkDirectory):
    run = prepare(work, "refused", "stage.steps=5", "stage.init_from=none", stage="language")
    for step in (0, 6):
        with pytest.raises(ArtefactError, match=rf"step {step}: expected 1 to stage\.steps=5"):
            slices_of_step(run, step)

    # As if the corpus had been built again from other text since the run began.
    from dist_lm.storage import durable

    durable.write_sealed(run.corpora, {"language": {"train": "0" * 64, "folder": "language"}})
    with pytest.raises(ArtefactError, match="began on other content of corpus language"):
        slices_of_step(run, 1)


@pytest.mark.heavy
def test_people_and_programs_are_told_the_same(work: WorkDirectory, capsys: pytest.CaptureFixture[str]):
    run = prepare(work, "printed", "stage.steps=5", "stage.init_from=none", stage="code")
    used = slices_of_step(run, 2)
    print_step(run, 2, OutputConsole(), as_json=True, with_text=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["source"] for line in lines] == [part.source for part in used]
    assert all(line["text"] for line in lines)

    console = OutputConsole(file=io.StringIO(), width=80)
    print_step(run, 2, console, as_json=False, with_text=False)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(f"sequence {part.sequence}, of {part.corpus}" in shown for part in used)
    assert all(part.source in shown for part in used)
    # `data without` takes this form; a number with commas would be refused there.
    assert all(f"  {part.corpus}:{part.document}  " in shown for part in used)
