"""Several contents of one corpus in a work directory: each in its folder, no held-out text in train of a later one."""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.chat.documents import read_ranking
from dist_lm.config.corpus import SPLITS, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.ingest import NothingHeldOutError, TextSplits, split_documents
from dist_lm.data.manifest import manifest_path, read_manifest, write_manifest
from dist_lm.data.screening import IngestReport
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards import builds, identity, other_corpora, stage
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL
from tests.stages.test_corpus_states import killed_after

WORDS = [f"{word}{number}" for word in ("return", "value", "self", "the", "index", "table") for number in range(50)]


@pytest.fixture
def empty(work: WorkDirectory) -> WorkDirectory:
    """A work directory with a tokenizer and no corpus."""
    shutil.rmtree(work.path / "corpora")
    return work


def texts(seed: int, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [f"row {seed} {number}: {' '.join(draw.choices(WORDS, k=draw.randint(8, 40)))}\n" for number in range(count)]


def write_texts(path: Path, rows: list[str]) -> SourceConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return SourceConfig("jsonl", "english", "MIT", path=str(path))


def write_chats(path: Path, rows: list[tuple[str, str]]) -> SourceConfig:
    def line(request: str, answer: str) -> str:
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns}) + "\n"

    path.write_text("".join(line(*row) for row in rows))
    return SourceConfig("messages", "chat", "MIT", path=str(path))


def config_of(work: WorkDirectory, corpora: dict[str, list[SourceConfig]], **changes) -> Config:
    config = compose_config(["stage=shards", *TINY_MODEL, "tokenizer.workers=1", f"work_dir={work.path}"])
    settings = {"documents_per_member": 8, "shard_tokens": 2_000, "val_fraction": 0.2} | changes
    return replace(config, corpus=replace(config.corpus, corpora=corpora, **settings))


def build(config: Config) -> dict[str, Path]:
    """Builds the corpora of a configuration; returns their folders by name."""
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    return {name: identity.folder_of(config, name) for name in config.corpus.corpora}


def hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file, but for the caches into which readers write checksums."""
    caches = {"train.index", "val.index"}
    files = [path for path in folder.iterdir() if path.name not in caches]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decoded(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(WorkDirectory(folder.parents[1]).tokenizer_model)
    corpus = TokenCorpus.open(folder, split)
    spans = ((number, 0, int(corpus.lengths[number])) for number in range(corpus.n_documents))
    return [tokenizer.decode(corpus.tokens(*span).tolist()) for span in spans]


def leaks(order: list[Path]) -> Iterator[tuple[str, str, str]]:
    """Yields (folder, other folder, text) for every val text of a folder that stands in train of a later or earlier
    one."""
    trained = {folder: decoded(folder, "train") for folder in order}
    for folder in order:
        held_out = decoded(folder, "val")
        assert held_out
        assert trained[folder]
        for other in order:
            found = (val for val in held_out if any(val in text for text in trained[other]))
            yield from ((folder.name, other.name, val) for val in found)


@pytest.mark.heavy
def test_two_data_sets_of_one_name_and_back(empty: WorkDirectory, tmp_path: Path) -> None:
    """Finds a finished corpus that the second data set changes, and one that is not found again."""
    ours, theirs = write_texts(tmp_path / "a.jsonl", texts(1)), write_texts(tmp_path / "b.jsonl", texts(2))
    first, second = config_of(empty, {"code": [ours]}), config_of(empty, {"code": [theirs]})
    before = hashes(build(first)["code"])
    assert not SHARDS.inspect(second).ready
    beside = build(second)["code"]
    assert beside.name.startswith("code-")
    assert hashes(empty.corpus("code")) == before
    assert build(first)["code"] == empty.corpus("code")
    assert build(second)["code"] == beside
    assert hashes(empty.corpus("code")) == before


@pytest.mark.heavy
def test_the_val_fraction_of_one_changes_nothing_of_others(empty: WorkDirectory, tmp_path: Path) -> None:
    """Finds corpora that share one fingerprint: then a setting of one makes all others stale."""
    corpora = {
        "language": [write_texts(tmp_path / "a.jsonl", texts(1))],
        "code": [write_texts(tmp_path / "b.jsonl", texts(2))],
    }
    config = config_of(empty, corpora)
    build(config)
    before = {name: hashes(empty.corpus(name)) for name in corpora}
    other = config_of(empty, corpora, val_fraction=0.1)
    other = replace(other, stage=replace(stage.own(other), corpora=["code"]))
    SHARDS.build(other, Console())
    assert SHARDS.inspect(other).ready
    assert SHARDS.inspect(config).ready
    assert {name: hashes(empty.corpus(name)) for name in corpora} == before


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_no_val_of_a_folder_stands_in_train_of_a_later_one(empty: WorkDirectory, tmp_path: Path, seed: int) -> None:
    """Brute force over data sets that share texts: as they are, inside longer texts, and with addresses in them."""
    draw = random.Random(seed)
    pool = texts(seed, 80)
    # Tars hold a placeholder for each address, sources do not.
    for _ in range(40):
        addressed = [f"{word} someone{draw.randint(0, 99)}@example.org" for word in draw.choices(WORDS, k=12)]
        pool.append(f"To {' and '.join(addressed)}\n")

    order: list[Path] = []
    for number in range(4):
        chosen = draw.sample(pool, 60)
        # Some texts of the pool stand inside longer ones.
        wrapped = [f"Before it {draw.random()} came this: {text} and after it came that\n" for text in chosen[:15]]
        rows = chosen[15:] + wrapped + texts(1000 * seed + number, 20)
        source = write_texts(tmp_path / f"{number}.jsonl", rows)
        name = draw.choice(["code", "language"])
        config = config_of(empty, {name: [source]}, val_fraction=draw.choice([0.1, 0.3]))
        config.corpus.cleaning.emails = draw.random() < 0.7
        order.append(build(config)[name])

    assert len(set(order)) == 4
    assert not list(leaks(order))
    dropped = [read_manifest(folder).ingest["languages"]["english"]["dropped"] for folder in order]
    assert any(reasons.get("contains_val") for reasons in dropped[1:]), "the data sets share no held-out text"
    assert any(reasons.get("overlapping") for reasons in dropped[1:])


@pytest.mark.heavy
def test_conversations_and_texts_hold_no_val_of_each_other(empty: WorkDirectory, tmp_path: Path) -> None:
    """Finds chats with a held-out request, chats that quote a held-out text, and texts that quote a held-out chat."""
    plain = texts(1)
    chats = [(f"Question {number}: {text}", f"Answer {number}") for number, text in enumerate(texts(2))]
    again = [(request, f"Another {answer}") for request, answer in chats]
    quoting = [(f"Explain {number}: {text}", "It says so") for number, text in enumerate(plain)]
    transcripts = [f"{request} {answer} {number}\n" for number, (request, answer) in enumerate(chats)]

    order = [
        build(config_of(empty, {name: [source]}, val_fraction=fraction))[name]
        for name, source, fraction in (
            ("code", write_texts(tmp_path / "texts.jsonl", plain), 0.3),
            ("tools", write_chats(tmp_path / "chats.jsonl", chats), 0.3),
            ("tools", write_chats(tmp_path / "again.jsonl", again + quoting), 0.1),
            ("code", write_texts(tmp_path / "transcripts.jsonl", transcripts + texts(3)), 0.1),
        )
    ]
    assert not list(leaks(order))

    def requests(folder: Path, split: str) -> set[str]:
        return {text.partition("assistant")[0] for text in decoded(folder, split)}

    held_out = requests(order[1], "val")
    assert held_out
    assert not held_out & requests(order[2], "train")
    assert requests(order[1], "train") & requests(order[2], "train")
    assert not requests(order[2], "val") & requests(order[1], "train")
    trained = " ".join(decoded(order[2], "train"))
    assert not [text for text in decoded(order[0], "val") if text.strip() in trained]
    assert [text for text in decoded(order[0], "train") if text.strip() in trained]


@pytest.mark.heavy
def test_sources_of_earlier_corpora_need_not_be_there(empty: WorkDirectory, tmp_path: Path) -> None:
    """Finds a comparison that reads the sources of finished corpora again."""
    first = write_texts(tmp_path / "a.jsonl", texts(1))
    shared = write_texts(tmp_path / "b.jsonl", texts(1)[:40] + texts(2))
    old = build(config_of(empty, {"language": [first]}))["language"]
    (tmp_path / "a.jsonl").unlink()
    new = build(config_of(empty, {"language": [first], "code": [shared]}))["code"]
    assert not list(leaks([old, new]))
    assert not set(decoded(new, "val")) & set(decoded(old, "train"))
    assert read_manifest(new).recipe.compared == {"language": read_manifest(old).splits["val"].content}


@pytest.mark.heavy
def test_a_corpus_is_compared_with_the_other_content_of_the_corpus_beside_it(
    empty: WorkDirectory, tmp_path: Path
) -> None:
    """Finds folders that are mixed up: `language` is another data set here than that of the configuration."""
    old = build(config_of(empty, {"language": [write_texts(tmp_path / "a.jsonl", texts(1))]}))["language"]
    new_source = write_texts(tmp_path / "b.jsonl", texts(2))
    config = config_of(empty, {"language": [new_source], "code": [write_texts(tmp_path / "c.jsonl", texts(1))]})
    config.corpus.val_fraction = 0.1  # so that other texts of the shared ones are held out
    folders = []
    for name in ("language", "code"):
        SHARDS.build(replace(config, stage=replace(stage.own(config), corpora=[name])), Console())
        folders.append(identity.folder_of(config, name))
    assert folders[0] != old
    assert not list(leaks([old, *folders]))


@pytest.mark.heavy
def test_a_kill_of_the_second_build_changes_no_byte(
    empty: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_lm.tokenizer.encode.CHUNK_DOCUMENTS", 1)
    first = config_of(empty, {"code": [write_texts(tmp_path / "a.jsonl", texts(1))]})
    second = config_of(empty, {"code": [write_texts(tmp_path / "b.jsonl", texts(1)[:20] + texts(2, 100))]})
    before = hashes(build(first)["code"])
    folder = build(second)["code"]
    undisturbed = {name: value for name, value in hashes(folder).items() if not name.endswith(".index")}
    shutil.rmtree(folder)

    chosen = identity.with_folders(second, ["code"])
    texts_of_second = TextSplits(
        second.corpus, 0, earlier=other_corpora.earlier_corpora(chosen, other_corpora.earlier_folders(chosen, "code"))
    )
    with pytest.raises(RuntimeError, match="killed"):
        builds.build_corpus(chosen, "code", texts_of_second, Console(), killed_after(60))
    assert "unfinished" in SHARDS.inspect(second).detail
    kept = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    assert kept
    assert build(second)["code"] == folder
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    assert {name: value for name, value in hashes(folder).items() if not name.endswith(".index")} == undisturbed
    assert hashes(empty.corpus("code")) == before


@pytest.mark.heavy
def test_a_repair_gives_the_bytes_of_the_first_build_although_later_corpora_are_there(
    empty: WorkDirectory, tmp_path: Path
) -> None:
    """Finds a repair that compares with corpora of later days, whose val its train may hold."""
    rows = texts(1)
    first = config_of(empty, {"code": [write_texts(tmp_path / "a.jsonl", rows)]}, val_fraction=0.1)
    wrapped = [f"{text.strip()} and more of it {number}\n" for number, text in enumerate(rows)]
    second = config_of(empty, {"code": [write_texts(tmp_path / "b.jsonl", wrapped + texts(2))]}, val_fraction=0.3)
    folder = build(first)["code"]
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    later = build(second)["code"]
    damaged = folder / "train-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[:1000])

    assert SHARDS.inspect(second).ready  # the other one can still be read
    assert TokenCorpus.open(later, "train").n_documents
    assert "code damaged" in SHARDS.inspect(first).detail
    assert build(first)["code"] == folder
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before


def test_a_damaged_corpus_stops_a_new_one_by_name(empty: WorkDirectory, tmp_path: Path) -> None:
    """Finds a new corpus that silently is not compared with one that cannot be read."""
    folder = build(config_of(empty, {"code": [write_texts(tmp_path / "a.jsonl", texts(1))]}))["code"]
    for tar in folder.glob("val-*.tar"):
        content = bytearray(tar.read_bytes())
        content[1500:1510] = b"\xff" * 10
        tar.write_bytes(content)
    new = config_of(empty, {"language": [write_texts(tmp_path / "b.jsonl", texts(2))]})
    with pytest.raises(ArtefactError, match=r"corpora/code/val-000000.tar.* restore it, or remove its folder"):
        SHARDS.build(new, Console())
    assert not empty.corpus_manifest("language").is_file()


def as_written_before(folder: Path, *, own: bool) -> None:
    """Makes the manifest what earlier releases wrote: no earlier corpora, and at first only the joint fingerprint."""
    manifest = read_manifest(folder)
    assert not manifest.recipe.compared
    recipe = replace(manifest.recipe, own_fingerprint=manifest.recipe.own_fingerprint if own else "")
    manifest = replace(manifest, recipe=recipe, documents=manifest.documents if own else {})
    write_manifest(folder, manifest)
    content = json.loads(manifest_path(folder).read_text())
    del content["compared"], content["checksum"]
    if not own:
        del content["own_fingerprint"], content["documents"]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    manifest_path(folder).write_text(json.dumps(content))


@pytest.mark.heavy
@pytest.mark.parametrize("own", [True, False])
def test_corpora_of_earlier_releases_are_found(empty: WorkDirectory, tmp_path: Path, own: bool) -> None:
    """Finds old manifests that match nothing, so that all is built again."""
    corpora = {
        "language": [write_texts(tmp_path / "a.jsonl", texts(1))],
        "code": [write_texts(tmp_path / "b.jsonl", texts(1)[:30] + texts(2))],
        "tools": [write_chats(tmp_path / "c.jsonl", [(text, "Yes") for text in texts(3)])],
    }
    text = {name: sources for name, sources in corpora.items() if name != "tools"}
    config = config_of(empty, text)
    build(config)
    for name in text:
        as_written_before(empty.corpus(name), own=own)
    before = {name: hashes(empty.corpus(name)) for name in text}
    assert SHARDS.inspect(config).ready
    assert build(config_of(empty, corpora)) == {name: empty.corpus(name) for name in corpora}

    # One that is damaged comes back as it was.
    (empty.corpus("code") / "train-000000.tar").unlink()
    build(config)
    tars = {name: value for name, value in hashes(empty.corpus("code")).items() if name.endswith(".tar")}
    assert tars.items() <= before["code"].items()
    assert hashes(empty.corpus("language")) == before["language"]


@pytest.mark.heavy
def test_a_new_data_set_beside_an_old_corpus_drops_its_val(empty: WorkDirectory, tmp_path: Path) -> None:
    old = config_of(empty, {"code": [write_texts(tmp_path / "a.jsonl", texts(1))]})
    folder = build(old)["code"]
    as_written_before(folder, own=True)
    new = build(config_of(empty, {"code": [write_texts(tmp_path / "b.jsonl", texts(1) + texts(2))]}, val_fraction=0.1))
    assert not list(leaks([folder, new["code"]]))
    assert SHARDS.inspect(old).ready


def test_a_folder_that_is_named_is_used_and_one_that_is_not_there_is_refused(
    empty: WorkDirectory, tmp_path: Path
) -> None:
    first = config_of(empty, {"code": [write_texts(tmp_path / "a.jsonl", texts(1))]})
    second = config_of(empty, {"code": [write_texts(tmp_path / "b.jsonl", texts(2))]})
    build(first)
    named = replace(second, corpus=replace(second.corpus, folders={"code": "code"}))
    look = SHARDS.look(named, is_target=True, rebuilt=())
    assert look.config.corpus.folders == {"code": "code"}
    assert "code stays, in folder code: its settings are others" in look.detail

    # From other sources it cannot be repaired.
    before = hashes(empty.corpus("code"))
    tar = empty.corpus("code") / "train-000000.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:1000])
    with pytest.raises(ArtefactError, match=r"corpora/code is damaged, and cannot be built again .*path\[0\]="):
        SHARDS.look(named, is_target=True, rebuilt=())
    with pytest.raises(ArtefactError, match=r"corpora/code is damaged, and cannot be built again"):
        SHARDS.build(named, Console())
    tar.write_bytes(content)
    assert hashes(empty.corpus("code")) == before

    missing = replace(second, corpus=replace(second.corpus, folders={"code": "code-00000000"}))
    with pytest.raises(ConfigError, match=r"corpus\.folders\.code=code-00000000: expected a finished folder"):
        SHARDS.look(missing, is_target=True, rebuilt=())


def test_no_corpus_may_be_named_like_a_folder_beside_another(empty: WorkDirectory, tmp_path: Path) -> None:
    config = config_of(empty, {"code-1a2b3c4d": [write_texts(tmp_path / "a.jsonl", texts(1))]})
    with pytest.raises(ConfigError, match="code-1a2b3c4d: expected another name"):
        SHARDS.check(config)


@pytest.mark.heavy
def test_preferences_with_the_prompts_of_conversations_hold_out_what_these_hold_out(
    empty: WorkDirectory, tmp_path: Path
) -> None:
    """Finds preferences that cannot be built behind conversations with their prompts, or that train on val of these."""
    questions = texts(2)
    chats = build(config_of(empty, {"tools": [write_chats(tmp_path / "a.jsonl", [(q, "Yes") for q in questions])]}))
    trained = decoded(chats["tools"], "train")
    held_out = {question for question in questions if not any(question.strip() in text for text in trained)}
    pairs = [{"prompt": question, "chosen": "Yes", "rejected": "No"} for question in questions]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = SourceConfig("preferences", "pairs", "MIT", path=str(tmp_path / "pairs.jsonl"))
    for fraction in (0.001, 0.6):  # the first chooses none
        config = config_of(empty, {"rankings": [source]}, val_fraction=fraction)
        splits = TextSplits(config.corpus, config.seed, earlier=other_corpora.earlier_corpora(config, [chats["tools"]]))
        report = IngestReport()
        prompts: dict[str, set[str]] = {split: set() for split in SPLITS}
        for split, document, _ in split_documents(config.corpus, "rankings", config.seed, report, splits):
            prompts[split].add(read_ranking(document.text).prompt.messages[0].content)
        assert prompts["val"]
        assert prompts["val"] <= held_out
        assert prompts["train"]
        assert not prompts["train"] & held_out
        counts = report.languages["pairs"]
        assert counts.seen == len(questions) == counts.kept + sum(counts.dropped.values())
    assert prompts["val"] != held_out  # where a choice is left, the share decides


@pytest.mark.heavy
def test_a_larger_share_is_named_where_conversations_train_on_the_few_prompts_that_were_chosen(
    empty: WorkDirectory, tmp_path: Path
) -> None:
    """Finds advice to remove copies where only the prompt that was chosen is one, and a share that helps nothing."""
    questions = texts(2)
    pairs = [{"prompt": question, "chosen": "Yes", "rejected": "No"} for question in questions]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rankings = {"rankings": [SourceConfig("preferences", "pairs", "MIT", path=str(tmp_path / "pairs.jsonl"))]}

    def held_out(fraction: float, earlier: Sequence[Path] = ()) -> list[str]:
        """Returns the prompts that this share holds out."""
        config = config_of(empty, rankings, val_fraction=fraction)
        splits = TextSplits(config.corpus, config.seed, earlier=other_corpora.earlier_corpora(config, earlier))
        documents = split_documents(config.corpus, "rankings", config.seed, IngestReport(), splits)
        chosen = [document.text for split, document, _ in documents if split == "val"]
        return [read_ranking(text).prompt.messages[0].content for text in chosen]

    with pytest.raises(NothingHeldOutError) as too_small:
        held_out(1e-6)
    assert too_small.value.share is not None
    fraction = too_small.value.share + 1e-9
    (first,) = held_out(fraction)

    # Conversations train on that prompt alone.
    train = write_chats(tmp_path / "a.jsonl", [(question, "Yes") for question in (first, "Where?", "When?")])
    val = replace(write_chats(tmp_path / "b.jsonl", [("How?", "So")]), held_out=True)
    chats = build(config_of(empty, {"tools": [train, val]}))["tools"]
    with pytest.raises(
        NothingHeldOutError, match=r"\(overlapping\).* or set corpus\.val_fraction above 0\.\d+"
    ) as error:
        held_out(fraction, [chats])
    assert error.value.share is not None
    assert error.value.share > fraction
    (second,) = held_out(error.value.share + 1e-9, [chats])
    assert second != first


@pytest.mark.heavy
def test_a_data_set_whose_val_all_stands_in_train_of_an_earlier_one_is_refused(
    empty: WorkDirectory, tmp_path: Path
) -> None:
    """Finds a corpus without val, and a message that names no cause."""
    wrapped = [f"Again {number}: {text}" for number, text in enumerate(texts(1))]
    first = build(config_of(empty, {"code": [write_texts(tmp_path / "a.jsonl", wrapped)]}, val_fraction=0.05))["code"]
    trained = decoded(first, "train")
    wrapped = [text.partition(": ")[2] for text in trained]
    with pytest.raises(ArtefactError, match=r"none of its \d+ documents is held out: train .* \(overlapping\)"):
        SHARDS.build(config_of(empty, {"code": [write_texts(tmp_path / "b.jsonl", wrapped)]}), Console())
    assert all(TokenCorpus.open(empty.corpus("code"), split).n_documents for split in SPLITS)
