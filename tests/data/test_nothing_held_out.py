"""Errors about data that gives nothing to train or to hold out name the cause, and their way out helps."""

import bz2
import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.ingest import split_documents
from dist_lm.data.screening import IngestReport
from dist_lm.errors import ArtefactError


def text(number: int, size: int = 40) -> str:
    return "\n".join(f"value_{number}_{line} = {number * line}" for line in range(size)) + "\n"


def rows_in(folder: Path, texts: list[str], name: str = "a.jsonl") -> SourceConfig:
    path = folder / name
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in texts))
    return SourceConfig("jsonl", language="python", path=str(path), licence="MIT")


def splits_of(sources: list[SourceConfig], **keys) -> set[str]:
    config = CorpusConfig("own", {"code": sources}, **keys)
    return {split for split, _, _ in split_documents(config, "code", 0, IngestReport())}


def refusal(sources: list[SourceConfig], **keys) -> str:
    with pytest.raises(ArtefactError) as refused:
        splits_of(sources, **keys)
    return str(refused.value)


def test_too_small_a_share_is_named_with_one_that_holds_some_out(tmp_path: Path) -> None:
    source = rows_in(tmp_path, [text(number) for number in range(6)])
    message = refusal([source], val_fraction=0.001)
    share = float(re.findall(r"expected above (0\.\d+)", message)[0])
    assert "val_tokens" not in message
    assert splits_of([source], val_fraction=share + 0.001) == {"train", "val"}


def test_val_tokens_is_named_where_it_is_the_cause(tmp_path: Path) -> None:
    source = rows_in(tmp_path, [text(number, 400) for number in range(40)])
    message = refusal([source], val_fraction=0.3, val_tokens=10)
    assert "corpus.val_tokens=10" in message
    assert "val_fraction" not in message
    enough = int(re.findall(r"expected at least (\d+)", message)[0])
    assert splits_of([source], val_fraction=0.3, val_tokens=enough) == {"train", "val"}


def test_one_group_cannot_be_divided_by_any_share(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": f"{n}"}] for n in range(50)]
    chats.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    same_turn = SourceConfig("messages", language="english", path=str(chats), licence="MIT")
    message = refusal([same_turn], val_fraction=0.02)
    assert "none of its 50 documents is held out: they begin with the same user turn" in message
    assert "val_fraction" not in message

    held_out = tmp_path / "val.jsonl"
    other_turn = [{"role": "user", "content": "Good bye"}, {"role": "assistant", "content": "Bye"}]
    held_out.write_text(json.dumps({"messages": other_turn}) + "\n")
    own_val = SourceConfig("messages", language="english", path=str(held_out), licence="MIT", held_out=True)
    assert splits_of([same_turn, own_val]) == {"train", "val"}


def test_one_text_file_cannot_be_divided_by_any_share(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text(1, 400))
    book = SourceConfig("files", language="english", path=str(tmp_path / "book.txt"), licence="MIT")
    message = refusal([book], val_fraction=0.02)
    assert (
        "none of its 1 documents is held out: they are one text or of one repository, which is not divided" in message
    )
    assert "val_fraction" not in message

    (tmp_path / "val.txt").write_text(text(2))
    own_val = SourceConfig("files", language="english", path=str(tmp_path / "val.txt"), licence="MIT", held_out=True)
    assert splits_of([book, own_val]) == {"train", "val"}


def test_few_repositories_are_told_a_share_that_holds_one_out(tmp_path: Path) -> None:
    """No share below the smallest hash of a repository helps: the message names it."""
    for number in range(3):
        (tmp_path / f"repository_{number}" / ".git").mkdir(parents=True)
        for file in range(5):
            (tmp_path / f"repository_{number}" / f"{file}.py").write_text(text(10 * number + file))
    repositories = SourceConfig("files", path=str(tmp_path), licence="MIT")
    message = refusal([repositories], val_fraction=1e-6)
    assert "val_tokens" not in message
    share = float(re.findall(r"expected above (0\.\d+)", message)[0])
    assert splits_of([repositories], val_fraction=share + 0.001) == {"train", "val"}


def test_copies_of_val_in_train_are_named_as_the_cause(tmp_path: Path) -> None:
    # Each text comes once more inside a longer one: whichever is held out, train has it.
    texts = [text(number) for number in range(30)]
    everything = "".join(texts)
    source = rows_in(tmp_path, [*texts, *(f"{everything}# copy {number}\n" for number in range(30))])
    message = refusal([source], val_fraction=0.1)
    assert "(overlapping)" in message
    assert "val_fraction" not in message


def test_a_text_that_is_too_long_is_not_called_binary_or_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(1, 100_000))
    message = refusal([SourceConfig("files", path=str(tmp_path / "a.txt"), licence="MIT")])
    assert "too_long 1; divide the documents, or raise corpus.max_document_bytes (now 1,000,000)" in message
    assert "binary" not in message


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.py", content)
    return buffer.getvalue()


@pytest.mark.parametrize("reader", ["files", "jsonl", "csv"])
@pytest.mark.parametrize("compress", [zipped, bz2.compress])
def test_compressions_without_their_suffix_are_named(tmp_path: Path, reader: str, compress) -> None:
    (tmp_path / "data").write_bytes(compress(text(1).encode()))
    message = refusal([SourceConfig(reader, language="python", path=str(tmp_path / "data"), licence="MIT")])
    assert "rename" in message
    assert "binary" not in message


def parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [text(n) for n in range(9)]}), buffer)
    return buffer.getvalue()


def test_compressed_parquet_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(parquet()))
    message = refusal([SourceConfig("parquet", language="python", path=str(path), licence="MIT")])
    assert "unpack it" in message
    assert "damaged" not in message


def test_encrypted_parquet_is_not_called_damaged(tmp_path: Path) -> None:
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class InMemory(encryption.KmsClient):
        def wrap_key(self, key_bytes, master_key_identifier):
            return key_bytes.hex()

        def unwrap_key(self, wrapped_key, master_key_identifier):
            return bytes.fromhex(wrapped_key)

    factory = encryption.CryptoFactory(lambda _: InMemory())
    keys = encryption.EncryptionConfiguration(footer_key="footer", column_keys={"column": ["text"]})
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), keys)
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [text(1)]})
    with pyarrow.parquet.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    message = refusal([SourceConfig("parquet", language="python", path=str(path), licence="MIT")])
    assert "the file is encrypted" in message
    assert "damaged" not in message
