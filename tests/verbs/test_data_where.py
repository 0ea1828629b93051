"""Places of a text, and the steps that read them, against reading all documents and all steps."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_lm.data.journal import REJECTED
from dist_lm.data.order import DocumentSlice
from dist_lm.data.text_search import ByteTable, find_text
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.stages.registry import load_config
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.readable import OutputConsole
from dist_lm.verbs.data_step import config_of, slices_of_step, training_sequences
from dist_lm.verbs.data_where import Place, places_of_text, print_places
from tests.training_run import prepare

STEPS = 40


def contents(corpus: TokenCorpus, tokenizer: Tokenizer) -> list[bytes]:
    return [
        tokenizer.content(corpus.tokens(document, 0, int(corpus.lengths[document])).tolist())
        for document in range(corpus.n_documents)
    ]


def substrings(texts: list[bytes], count: int) -> Iterator[str]:
    """Pieces of documents, some short and frequent, some long."""
    rng = random.Random(0)
    while count:
        text = rng.choice(texts).decode(errors="ignore")
        begin = rng.randrange(max(1, len(text)))
        if piece := text[begin : begin + rng.choice((1, 3, 8, 30, 200))]:
            yield piece
            count -= 1


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["code", "tools"])
def test_every_place_of_a_text_is_found_and_no_other(tiny_work: WorkDirectory, name: str):
    """Finds a place that is missed where a text begins or ends inside a token, and one across two documents."""
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    corpus = TokenCorpus.open(tiny_work.corpus(name), "train")
    table = ByteTable(tokenizer.vocabulary())
    texts = contents(corpus, tokenizer)
    special = {*tokenizer.special_ids.values()}
    for text in substrings(texts, 25):
        sought = text.encode()
        found = list(find_text(corpus, sought, table))
        for document, start, stop in found:
            tokens = corpus.tokens(document, start, stop).tolist()
            assert sought in tokenizer.content(tokens)
            assert sought not in tokenizer.content(tokens[1:])
            assert sought not in tokenizer.content(tokens[:-1])
            assert special.isdisjoint(tokens)

        # Marks have no bytes: a text that goes on behind one is not the text.
        if name == "code":
            expected = [sum(each.startswith(sought, at) for at in range(len(each))) for each in texts]
            assert [sum(part.document == n for part in found) for n in range(len(texts))] == expected


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("code", ("stage.mix={language: 0.25}",)),
        ("code", ("stage.phases=[{until: 0.3, mix: {code: 1}}, {mix: {code: 2, language: 1}}]",)),
        ("code", ("stage.fim_rate=0.5",)),
        ("tools", ("stage.too_long=split",)),
    ],
    ids=["mix", "phases", "infill", "conversations"],
)
def test_steps_are_those_of_a_replay(work: WorkDirectory, stage: str, settings: tuple[str, ...]):
    """Finds a sequence that is missed at a cut, in a later epoch or in a mix, or one that has no token of the text."""
    options = (f"stage.steps={STEPS}", "stage.global_batch=8", "stage.seq_len=64", "stage.init_from=none")
    run = prepare(work, "asked", *options, *settings, stage=stage)
    tokenizer = Tokenizer.load(work.tokenizer_model)
    corpus = TokenCorpus.open(work.corpus(load_config(run.config).stage.corpus), "train")
    sequences = training_sequences(load_config(run.config), run)
    read = [sequences.slices(number) for number in range(8 * STEPS)]
    assert len({part for _, parts in read for part in parts}) > corpus.n_documents // 4

    for text in substrings(contents(corpus, tokenizer), 6):
        for place in places_of_text(config_of(run), run, text, most=10)[0]:
            numbers = [number for number, (other, parts) in enumerate(read) if reads(other, parts, place)]
            assert place.steps == tuple(sorted({number // 8 + 1 for number in numbers})), (text, place)


def reads(corpus: TokenCorpus, parts: list[DocumentSlice], place: Place) -> bool:
    return corpus.directory.name == place.corpus and any(
        part.document == place.document and part.start < place.stop and part.stop > place.start for part in parts
    )


@pytest.mark.heavy
def test_ancestors_are_asked_too(work: WorkDirectory):
    """Finds a run whose start is not looked at, where most of its text is."""
    base = prepare(work, "earlier", "stage.steps=4", "stage.init_from=none")
    run = prepare(work, "later", "stage.steps=4", f"stage.init_from={base.path}", stage="code")
    corpus = TokenCorpus.open(work.corpus("language"), "train")
    tokenizer = Tokenizer.load(work.tokenizer_model)
    text = contents(corpus, tokenizer)[0].decode()[:60]

    console = OutputConsole(file=io.StringIO(), width=300)
    print_places(run, text, 5, console, as_json=False)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert f"{run.path}: " in shown
    assert f"{base.path}: 1 place" in shown


@pytest.mark.heavy
def test_an_imported_start_ends_the_search(work: WorkDirectory):
    """Finds a run on an open model that cannot be asked, and a path without a run that is called damaged."""
    base = work.run("import", "theirs")
    base.path.mkdir(parents=True)
    base.config.write_text("model:\n  name: theirs\nimported:\n  source: hf:theirs\n")
    run = prepare(work, "tuned", "stage.steps=4", "stage.init_from=none", stage="code")
    run.config.write_text(run.config.read_text().replace("init_from: none", f"init_from: {base.path}"))

    console = OutputConsole(file=io.StringIO(), width=300)
    print_places(run, "e", 1, console, as_json=False)
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "1 place" in printed
    assert f"{base.path}: an imported model" in printed

    for asked, refusal in ((base, "an imported model"), (work.run("code", "missing"), "no run is there")):
        with pytest.raises(ArtefactError, match=refusal):
            print_places(asked, "e", 1, console, as_json=False)
        with pytest.raises(ArtefactError, match=refusal):
            slices_of_step(asked, 1)


@pytest.mark.heavy
def test_a_text_of_special_meaning_is_text_and_a_cut_list_says_so(
    work: WorkDirectory, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """Finds a text that is taken for a pattern, and places that are left out without a word."""
    run = prepare(work, "literal", "stage.steps=4", "stage.init_from=none", stage="code")
    assert places_of_text(config_of(run), run, "[a-z ]", 5) == ([], False)

    print_places(run, "e", 5, OutputConsole(), as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5 * len({line["corpus"] for line in lines})
    assert "more places than --most 5" in caplog.text


@pytest.mark.heavy
def test_a_document_tells_what_was_dropped_for_it_and_that_it_is_left_out(work: WorkDirectory, tmp_path: Path):
    """Finds a near-duplicate that is told of another document, and a loss that is said to count."""
    path = tmp_path / "ids.txt"
    path.write_text("code:0\n")
    keys = ("stage.steps=4", "stage.init_from=none", f"stage.without={path}")
    run = prepare(work, "told", *keys, stage="code")
    corpus = TokenCorpus.open(work.corpus("code"), "train")
    text = contents(corpus, Tokenizer.load(work.tokenizer_model))[0].decode()
    (place, *_), _ = places_of_text(config_of(run), run, text, 5)
    assert (place.document, place.left_out, place.near_duplicates) == (0, True, ())

    lines = [
        {"place": f"copy {n}", "reason": "near_duplicate", "resembles": source}
        for n, source in enumerate((place.source, "another", place.source))
    ]
    rejected = corpus.directory / REJECTED
    rejected.write_text("".join(json.dumps(line) + "\n" for line in [{"place": "x", "reason": "null"}, *lines]))
    (place, *others), _ = places_of_text(config_of(run), run, text, 5)
    assert place.near_duplicates == ("copy 0", "copy 2")
    assert not any(other.left_out for other in others if other.document)

    console = OutputConsole(file=io.StringIO(), width=300)
    print_places(run, text, 1, console, as_json=False)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "without its loss" in shown
    # A line must hold a document as `data without` takes it, and a copied one must not need an edit.
    assert "    code:0, tokens " in shown
    assert "copy 2 was dropped as its near-duplicate" in shown
    rejected.write_text("[1]\n")
    with pytest.raises(ArtefactError, match=r"rejected\.jsonl: cannot be read"):
        places_of_text(config_of(run), run, text, 5)


@pytest.mark.heavy
def test_text_of_another_tokenizer_is_refused(work: WorkDirectory):
    """Finds tokens that are shown as the text of a tokenizer that the corpus was not written with."""
    run = prepare(work, "replaced", "stage.steps=4", "stage.init_from=none", stage="code")
    # An unknown field of the protobuf changes the file, and none of its pieces.
    work.tokenizer_model.write_bytes(work.tokenizer_model.read_bytes() + b"\xf8\x07\x01")
    with pytest.raises(ArtefactError, match="was written with another tokenizer"):
        places_of_text(config_of(run), run, "e", 5)
