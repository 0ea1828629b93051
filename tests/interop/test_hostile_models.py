"""Files of models that somebody else wrote: each is read right, or refused by one line that names it, in bounded time.

Damaged copies of a real folder and of a real GGUF file must never end in a traceback or in a hang, and what is accepted
must be what safetensors and gguf read, too.
"""

import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from dist_lm.errors import ArtefactError, UserError
from dist_lm.interop.gguf_header import described_gguf
from dist_lm.interop.snapshot import (
    chat_template_of,
    folder_of,
    model_in,
    snapshot_record,
    special_tokens_of,
    tokenizer_of,
)
from dist_lm.interop.snapshot_files import parsed
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.training.checkpoint_tensors import tensors_in
from tests.interop import hostile_models as hostile
from tests.patience import patient

the_bar = pytest.param(10_000, marks=[pytest.mark.bars, pytest.mark.timeout(7200)])
counts = pytest.mark.parametrize("count", [300, the_bar])
LIMIT_S = 10.0  # of a file


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.write_folder(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    copied.mkdir()
    for path in original.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


@pytest.fixture(scope="module")
def gguf_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pytest.importorskip("gguf")
    return hostile.write_gguf_file(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def outcome(read: Callable[..., Any], where: Path, *arguments: Any) -> Any:
    """What is read; None: refused, by one printable line that names the file. Any other error ends the test."""
    started = time.monotonic()
    try:
        return read(*arguments)
    except UserError as error:
        message = str(error)
    finally:
        assert time.monotonic() - started < patient(LIMIT_S)
    assert message.isprintable(), message
    assert str(where) in message
    return None


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- what was shown ---


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers=100000000: expected an integer from 1 to"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers=5000: the weights have 21 tensors"),
        ({"hidden_size": 10**11}, "hidden_size=100000000000: expected an integer from 1 to"),
        ({"hidden_size": 50.0}, "hidden_size=50.0: expected an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected an integer from 1 to"),
        ({"num_key_value_heads": "1"}, "num_key_value_heads=1: expected an integer"),
        ({"rope_scaling": "yarn"}, "rope_scaling=yarn: expected an object with rope_type"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, r"rope_scaling.rope_type=\['llama3'\]: expected default"),
        ({"rope_theta": "10000"}, "rope_theta=10000: expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: expected a positive number"),
        ({"architectures": 5}, "architectures=5: expected a list"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: expected one of"),
        ({"layer_types": [{}]}, "layer_types={}: expected full_attention"),
        ({"tie_word_embeddings": "yes\x1b[31m\n"}, r"tie_word_embeddings=yes\\x1b\[31m\\n: expected true or false"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused_by_file_and_key(folder: Path, values: Any, words: str) -> None:
    """Two of these hung for hours, the others ended in tracebacks."""
    change(folder, "config.json", **values)
    started = time.monotonic()
    with pytest.raises(ArtefactError, match=rf"{folder}/config\.json: {words}"):
        import_model(str(folder), "one", WorkDirectory(folder.parent / "work"))
    assert time.monotonic() - started < patient(LIMIT_S)
    assert not list((folder.parent / "work").rglob("*.safetensors"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_json_that_is_nested_deeply_is_refused_by_its_file(folder: Path, file: str) -> None:
    (folder / file).write_text('{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ArtefactError, match=rf"{folder}/{file}: "):
        import_model(str(folder), "one", WorkDirectory(folder.parent / "work"))


def test_a_message_of_a_library_is_printable(folder: Path) -> None:
    """The error quoted a merge of tokenizer.json with the escapes of a terminal in it."""
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    change(folder, "tokenizer.json", model=model | {"merges": [["a", "\x1b]0;title\x07\u202e"]]})
    with pytest.raises(ArtefactError, match=re.escape(rf"{path}: ")) as refused:
        tokenizer_of(folder, hostile.VOCAB_SIZE)
    assert r"\x1b]0;title\x07\u202e" in str(refused.value)
    assert str(refused.value).isprintable()


def test_tensors_that_share_bytes_are_refused(folder: Path) -> None:
    """They were accepted: two tensors of a model that the file holds once."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ArtefactError, match=rf"{path}: tensor {second}: .*are those of another tensor"):
        tensors_in(path)


@pytest.mark.parametrize(
    ("entries", "is_read"),
    [
        ('"__metadata__": null', True),
        ('"__metadata__": {"format": "\\ud83d\\ude00"}', True),
        ('"__metadata__": []', False),
        ('"__metadata__": {"format": 1}', False),
        ('"__metadata__": {"format": "\\ud800"}', False),
        ('"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "scale": NaN}', False),
    ],
)
def test_a_header_is_read_if_safetensors_reads_it(tmp_path: Path, entries: str, is_read: bool) -> None:
    """The last four were accepted."""
    header = f'{{{entries}, "b": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}}}'.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    if is_read:
        assert {*tensors_in(path)} == {*safe_open(path, "pt").keys()}
        return

    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
    with pytest.raises(ArtefactError, match=str(path)):
        tensors_in(path)


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_a_link_that_leaves_the_folder_is_refused(folder: Path, file: str) -> None:
    """A template that is a link to a secret of the user was copied into the run, and from there into an export."""
    secret = folder.parent / "secret"
    (folder / file).replace(secret)
    (folder / file).symlink_to(secret)
    work = WorkDirectory(folder.parent / "work")
    with pytest.raises(ArtefactError, match=rf"{folder}/{file} is a link that leaves"):
        import_model(str(folder), "one", work)
    assert not (folder.parent / "work").exists()
    with pytest.raises(ArtefactError, match=rf"{folder}/{file} is a link that leaves"):
        snapshot_record(str(folder), folder)


def test_links_into_the_cache_of_the_same_repository_work(folder: Path) -> None:
    """huggingface_hub keeps the files of all commits in `blobs`, and the folder of a commit holds links to them."""
    repository = folder.parent / "models--us--small"
    commit = repository / "snapshots" / "1234abcd"
    commit.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.replace(repository / "blobs" / str(number))
        (commit / path.name).symlink_to(f"../../blobs/{number}")
    model, _ = model_in(folder_of(str(commit)), "one")
    assert model.vocab_size == hostile.VOCAB_SIZE
    assert chat_template_of(commit) == hostile.TEMPLATE
    assert tokenizer_of(commit, model.vocab_size)[1] == "tokenizer.json"
    assert len(tensors_in(commit / "model.safetensors")) == 21

    # The repository of another model is outside.
    (commit / "chat_template.jinja").unlink()
    (folder.parent / "secret").write_text("token")
    (commit / "chat_template.jinja").symlink_to("../../../secret")
    with pytest.raises(ArtefactError, match="is a link that leaves"):
        chat_template_of(commit)


def test_what_is_no_regular_file_is_refused_at_once(folder: Path) -> None:
    """Reading a pipe waits for ever."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("nothing")
    with pytest.raises(ArtefactError, match=r"config\.json is not a regular file"):
        model_in(folder, "one")
    with pytest.raises(ArtefactError, match=r"chat_template\.jinja is a link to a file that does not exist"):
        chat_template_of(folder)


# --- damaged copies ---


def spoiled(content: bytes, random: Random, *ways: hostile.Spoil) -> bytes:
    return random.choice(ways)(content, random)


@counts
def test_a_damaged_config_is_a_model_or_refused(folder: Path, count: int) -> None:
    random, path = Random(1), folder / "config.json"
    content = path.read_bytes()
    accepted = 0
    for _ in range(count):
        path.write_bytes(spoiled(content, random, hostile.values_replaced, hostile.flipped))
        accepted += outcome(model_in, path, folder, "one") is not None
    assert 0 < accepted < count


@counts
def test_a_damaged_header_of_weights_is_what_safetensors_reads_or_refused(folder: Path, count: int) -> None:
    random, path = Random(2), folder / "model.safetensors"
    content = path.read_bytes()
    accepted = 0
    for number in range(count):
        damaged = spoiled(content, random, hostile.header_replaced, hostile.header_replaced, hostile.flipped)
        path.write_bytes(damaged)
        tensors = outcome(tensors_in, path, path)
        if tensors is None:
            continue
        accepted += 1
        # An oracle that maps the file costs more than the reading itself.
        if number % 8 == 0:
            with safe_open(path, "pt") as theirs:
                assert {*theirs.keys()} == tensors.keys()
                for name, tensor in tensors.items():
                    assert tuple(theirs.get_slice(name).get_shape()) == tensor.shape
                    assert hostile.bits_of(theirs.get_tensor(name)) == tensor.read().tobytes()
    assert 0 < accepted < count


@pytest.mark.heavy
@counts
def test_a_damaged_tokenizer_is_one_or_refused(folder: Path, count: int) -> None:
    random = Random(3)
    contents = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    accepted = 0
    for number in range(count):
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        name = [*contents][number % 2]
        (folder / name).write_bytes(spoiled(contents[name], random, hostile.values_replaced, hostile.flipped))
        accepted += outcome(tokenizer_of, folder, folder, hostile.VOCAB_SIZE) is not None
        outcome(special_tokens_of, folder, folder)
        if number % 2:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            outcome(chat_template_of, folder, folder)
    assert 0 < accepted < count


@counts
def test_a_damaged_sentencepiece_model_is_a_tokenizer_or_refused(tmp_path: Path, count: int) -> None:
    """The parser is C++, which may end its process."""
    random, content = Random(6), hostile.sentencepiece_model()
    accepted = 0
    for _ in range(count):
        (tmp_path / "tokenizer.model").write_bytes(hostile.flipped(content, random))
        accepted += outcome(tokenizer_of, tmp_path, tmp_path, hostile.VOCAB_SIZE) is not None
    assert 0 < accepted < count


@counts
def test_a_damaged_gguf_file_is_what_gguf_reads_or_refused(gguf_content: bytes, tmp_path: Path, count: int) -> None:
    gguf = pytest.importorskip("gguf")
    random, path = Random(4), tmp_path / "model.gguf"
    path.write_bytes(gguf_content)
    data_at = gguf.GGUFReader(path).data_offset
    accepted = 0
    for number in range(count):
        header = spoiled(gguf_content[:data_at], random, hostile.flipped, hostile.numbers_replaced)
        content = header + gguf_content[data_at:]
        described = outcome(parsed, path, str(path), described_gguf, content, len(content), str(path))
        if described is None:
            continue
        accepted += 1
        if number % 8 == 0:
            path.write_bytes(content)
            theirs = {
                t.name: (int(t.tensor_type), int(t.data_offset), int(t.n_bytes)) for t in gguf.GGUFReader(path).tensors
            }
            assert theirs == {name: (kind, offset, size) for name, kind, _, offset, size in described[-1]}
    assert 0 < accepted < count


@pytest.mark.parametrize(
    ("key", "code", "number", "words"),
    [
        ("llama.block_count", "I", 2_000_000_000, r"llama\.block_count=2000000000: expected an integer from 1 to"),
        ("llama.block_count", "I", 5000, r"llama\.block_count=5000: the file has 21 tensors"),
        ("llama.attention.head_count", "I", 0, r"llama\.attention\.head_count=0: expected an integer from 1 to"),
        ("llama.embedding_length", "I", 2**32 - 1, r"llama\.embedding_length=4294967295: expected"),
    ],
)
def test_a_gguf_file_that_claims_what_it_cannot_hold_is_refused_by_key(
    gguf_content: bytes, key: str, code: str, number: int, words: str
) -> None:
    """The first one hung: a table of 2e9 layers."""
    place = gguf_content.index(key.encode()) + len(key) + 4  # behind the type
    content = bytearray(gguf_content)
    struct.pack_into(f"<{code}", content, place, number)
    with pytest.raises(ArtefactError, match=f"model.gguf: {words}"):
        parsed("model.gguf", described_gguf, bytes(content), len(content), "model.gguf")


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges", "pre", "model"])
def test_a_gguf_file_without_a_key_of_its_tokenizer_is_refused_by_key(gguf_content: bytes, key: str) -> None:
    """It ended in a KeyError."""
    name = f"tokenizer.ggml.{key}".encode()
    content = gguf_content.replace(name, name[:-1] + b"?")
    with pytest.raises(ArtefactError, match=rf"model\.gguf: tokenizer\.ggml\.{key}=None: expected"):
        parsed("model.gguf", described_gguf, content, len(content), "model.gguf")
