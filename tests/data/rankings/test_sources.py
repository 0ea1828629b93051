"""Readers of rankings: local files, public data sets; what holds no comparison is counted, prompts decide the group."""

import json
from pathlib import Path

import pytest

from dist_lm.chat.documents import read_ranking
from dist_lm.chat.ranking import Judgement
from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.inputs import inputs_of
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.hub_rankings import read_hub_rankings
from dist_lm.data.sources.rankings import read_local_rankings
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError
from tests.data.reading import read_corpus


def source_of(path: Path, lines: list[dict], reader: str = "hub_rankings", **changes) -> SourceConfig:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    key = "dataset" if reader == "rankings" else "path"
    return SourceConfig(reader, "named", licence="MIT", **{key: str(path)}, **changes)


def document(candidate: Candidate) -> Document:
    assert isinstance(candidate, Document)
    assert candidate.form == "ranking"
    return candidate


def local(path: Path, count: int) -> SourceConfig:
    rows = [
        {"prompt": f"Say {number % 40}", "completions": [f"{number}", "no", "maybe"], "ranks": [2, 7, 2]}
        for number in range(count)
    ]
    return source_of(path, rows, "rankings")


def test_local_files_by_glob_and_one_side_for_a_prompt(tmp_path: Path) -> None:
    local(tmp_path / "b.jsonl", 2)
    source = local(tmp_path / "a.jsonl", 3)
    source.dataset = str(tmp_path / "*.jsonl")
    found = [document(one) for one in read_local_rankings(source, 0)]
    assert [one.name for one in inputs_of(source).taken] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert [one.source for one in found] == [f"{tmp_path}/{name}" for name in ("a.jsonl:0", "a.jsonl:1", "a.jsonl:2",
                                                                               "b.jsonl:0", "b.jsonl:1")]  # fmt: skip
    assert found[0].group == found[3].group != found[1].group
    assert read_ranking(found[0].text).ranks == (0, 1, 0)


def test_a_corpus_of_rankings_is_split_by_prompt(tmp_path: Path) -> None:
    config = CorpusConfig(name="own", corpora={"rankings": [local(tmp_path / "a.jsonl", 400)]}, val_fraction=0.2)
    sides: dict[str, set[str]] = {"train": set(), "val": set()}
    for split, one in read_corpus(config, "rankings", 0, IngestReport()):
        sides[split].add(one.group)
    assert sides["train"]
    assert sides["val"]
    assert not sides["train"] & sides["val"]


def test_files_that_are_not_there_or_no_rankings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset=.*nothing.jsonl: no such file"):
        next(read_local_rankings(SourceConfig("rankings", "l", dataset=str(tmp_path / "nothing.jsonl")), 0))
    source = source_of(tmp_path / "a.jsonl", [{"prompt": "a", "completions": ["b"]}], "rankings")
    with pytest.raises(ArtefactError, match=r"a.jsonl, line 1: 1 completions; expected 2 to 16"):
        next(read_local_rankings(source, 0))


def test_a_ranking_of_samples_has_no_reader_of_its_own() -> None:
    config = CorpusConfig(name="own", corpora={"r": [SourceConfig("synthetic_rankings", "s")]})
    with pytest.raises(ConfigError, match="stage=rankings builds"):
        next(read_corpus(config, "r", 0, IngestReport()))


def test_rows_of_two_answers(tmp_path: Path) -> None:
    chosen = "\n\nHuman: Hi\n\nAssistant: Hello"
    source = source_of(
        tmp_path / "hh-rlhf.jsonl",
        [
            {"chosen": chosen, "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
            {"chosen": chosen, "rejected": "\n\nHuman: Ho\n\nAssistant: No"},
        ],
    )
    first, second = read_hub_rankings(source, 0)
    assert read_ranking(document(first).text).completions == ("Hello", "No")
    assert document(first).language == "named"
    assert second == Rejected("named", f"{source.path[0]}:2", "no_ranking")


def test_rows_with_margins(tmp_path: Path) -> None:
    row = {
        "context": [{"role": "user", "content": "Hi"}],
        "response1": "a",
        "response2": "b",
        "overall_preference": 2,
    }
    (found,) = read_hub_rankings(source_of(tmp_path / "rows.jsonl", [row], rows="helpsteer3"), 0)
    assert read_ranking(document(found).text).judgements == (Judgement(1, 0, 2.0),)


def test_a_column_of_another_kind_is_a_broken_row(tmp_path: Path) -> None:
    row = {"context": [], "response1": "a", "response2": "b", "overall_preference": None}
    (found,) = read_hub_rankings(source_of(tmp_path / "rows.jsonl", [row], rows="helpsteer3"), 0)
    assert isinstance(found, Rejected)
    assert "a column holds another kind of value" in found.error
    (found,) = read_hub_rankings(source_of(tmp_path / "b.jsonl", [{"chosen": 1, "rejected": ""}], rows="hh-rlhf"), 0)
    assert isinstance(found, Rejected)
    assert found.error


def test_trees_by_language(tmp_path: Path) -> None:

    def message(tree: str, number: str, parent: str | None, role: str, rank: int | None) -> dict:
        shared = {"message_tree_id": tree, "lang": tree, "deleted": False}
        return shared | {"message_id": tree + number, "parent_id": parent, "role": role, "text": number, "rank": rank}

    rows = [
        row
        for tree in ("en", "de")
        for row in (
            message(tree, "0", None, "prompter", None),
            message(tree, "1", f"{tree}0", "assistant", 1),
            message(tree, "2", f"{tree}0", "assistant", 0),
        )
    ]
    source = source_of(tmp_path / "oasst1.jsonl", rows)
    assert [document(one).language for one in read_hub_rankings(source, 0)] == ["named_en", "named_de"]
    source.only = ["de"]
    (found,) = read_hub_rankings(source, 0)
    assert read_ranking(document(found).text).completions == ("2", "1")


def test_other_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows=\(by its name\): expected one of helpsteer3, hh-rlhf, oasst1"):
        next(read_hub_rankings(source_of(tmp_path / "some.jsonl", [{}]), 0))
    with pytest.raises(ConfigError, match=r"no column 'chosen': rows=hh-rlhf"):
        next(read_hub_rankings(source_of(tmp_path / "b.jsonl", [{"text": "a"}], rows="hh-rlhf"), 0))


@pytest.mark.parametrize(("rows", "key"), [("oasst1", {"licence_column": "l"}), ("hh-rlhf", {"only": ["en"]})])
def test_a_key_that_the_kind_of_rows_does_not_take_is_refused(tmp_path: Path, rows: str, key: dict) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(key))}=.*: rows={rows} does not take it"):
        next(read_hub_rankings(source_of(tmp_path / "b.jsonl", [{"l": "a"}], rows=rows, **key), 0))
