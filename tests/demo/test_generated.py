"""Generated SQL and Bash: valid, varied, and a function of seed and number alone."""

import random
import sqlite3
from contextlib import closing

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.ingest import split_of_group
from dist_lm.demo.bash import bash_document, read_bash
from dist_lm.demo.sql import read_sql, sql_document
from dist_lm.document import Document
from dist_lm.sandbox.syntax import parses
from tests.data.reading import seen_texts


def documents(reader, limit: int, seed: int) -> list[Document]:
    found = list(reader(SourceConfig("demo", "code", limit=limit), seed))
    assert all(isinstance(one, Document) for one in found)
    return found


@pytest.mark.parametrize("reader", [read_sql, read_bash])
def test_a_document_depends_on_seed_and_number_alone(reader):
    texts = [one.text for one in documents(reader, 40, seed=1)]
    assert texts[:20] == [one.text for one in documents(reader, 20, seed=1)]
    assert not set(texts) & {one.text for one in documents(reader, 20, seed=2)}


def test_every_generated_statement_runs_and_documents_differ():
    texts = [sql_document(random.Random(f"test {i}")) for i in range(500)]
    for text in texts:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(text)
    assert all(400 <= len(text) <= 3600 for text in texts)
    statements = [part.strip() for text in texts for part in text.split(";") if part.strip()]
    assert len(set(statements)) > 0.95 * len(statements)
    repeated = seen_texts(texts[:250], texts[250:])
    assert len(repeated) <= 5, "documents of which half can be read in others"
    for keyword in (
        "JOIN",
        "OVER (",
        "WITH",
        "UNION",
        "CREATE VIEW",
        "TRIGGER",
        "ON CONFLICT",
        "RECURSIVE",
        "CASE",
    ):
        assert sum(keyword in text.upper() for text in texts) > 10, keyword


def test_every_generated_script_parses_and_scripts_differ():
    texts = [bash_document(random.Random(f"test {i}"), held_out=i % 5 == 0) for i in range(200)]
    assert [text for text in texts if parses("bash", text) is False] == []
    assert len(set(texts)) == len(texts)
    assert all(text.startswith("#!") and text.endswith("\n") for text in texts)
    assert not any(mark in text for text in texts for mark in "‹›¦")
    assert sum("main() {" in text for text in texts) > 5


def test_val_scripts_are_about_things_that_no_train_script_does():
    found = documents(read_bash, 600, seed=0)
    sides = {side: [one.text for one in found if split_of_group(one.group, 0.05) == side] for side in ("train", "val")}
    assert 15 < len(sides["val"]) < 60
    assert len(seen_texts(sides["val"], sides["train"])) <= 2
