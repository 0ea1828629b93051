"""Reads the header of a GGUF file: shape, tokenizer and chat template of a model, and where its tensors are.

Spec: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The function `described_gguf` runs in the process with
limits (`dist_lm.interop.snapshot_files.parsed`). Every error is one line that names the file and the key or tensor.

    header    magic, version, number of tensors, number of keys
    keys      name, type, value; an array is the type of its elements, their number, and the elements
    tensors   name, number of dimensions, sizes (fastest first), type, offset in the data
    data      begins at a multiple of general.alignment
"""

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dist_lm.errors import ArtefactError, shown_value
from dist_lm.interop.architectures import FAMILIES, LARGEST, model_of
from dist_lm.interop.foreign_files import MOST_TENSORS
from dist_lm.interop.gguf_tokenizer import tokenizer_file

NAMES = {  # families of transformers -> architectures of llama.cpp
    "Llama": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Starcoder2": "starcoder2",
    "GPTNeoX": "gptneox",
    "SmolLM3": "smollm3",
    "Granite": "granite",
}
READ = ("Llama", "Qwen2", "Qwen3")  # families with the same activation in llama.cpp and transformers
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}  # keys of GGUF, and what config.json calls them
REQUIRED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
DERIVED = ("vocab_size", "attention.value_length", "rope.dimension_count")  # keys that follow from those in SIZES

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # without general.alignment
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_ELEMENTS = 1 << 24  # entries of an array; the largest vocabularies have 2**18 pieces
MOST_DIMENSIONS = 4


class _MoreNeededError(Exception):
    """Raised if the header goes on behind the bytes that were given, and the file has more."""


@dataclass
class _Bytes:
    """The beginning of a file, read from the front."""

    content: bytes
    file_bytes: int
    where: str
    position: int = 0

    def take(self, length: int) -> bytes:
        """Returns the next bytes.

        Raises:
            ArtefactError: the file has fewer.
            _MoreNeededError: the file has them, but they were not given.
        """
        end = self.position + length
        if end > self.file_bytes:
            raise self.damaged(f"{length} bytes at {self.position} reach over its end")
        if end > len(self.content):
            raise _MoreNeededError
        part = self.content[self.position : end]
        self.position = end
        return part

    def number(self, code: str) -> Any:
        """Returns the next number; `code` is that of `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """Returns the next string.

        Raises:
            ArtefactError: the file has fewer bytes.
        """
        start = self.position
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text at {start} is not UTF-8") from error

    def count(self, least_bytes: int, what: str) -> int:
        """Returns the next number, of things that take at least `least_bytes` each."""
        count = self.number("Q")
        if count * least_bytes > self.file_bytes - self.position:
            raise self.damaged(f"{count} {what} reach over its end")
        return count

    def value(self, value_type: int, key: str) -> Any:
        """Returns the next value; `key` is its key, for messages.

        Raises:
            ArtefactError: the file has fewer bytes.
        """
        if value_type == STRING:
            return self.text()
        if value_type in NUMBERS:
            return self.number(NUMBERS[value_type])
        if value_type != ARRAY:
            raise ArtefactError(f"{self.where}: {key}: unknown type {value_type}")

        element_type = self.number("I")
        if element_type != STRING and element_type not in NUMBERS:
            raise ArtefactError(f"{self.where}: {key}: an array of type {element_type}: expected numbers or texts")
        # A text takes at least the bytes of its length.
        element_bytes = 8 if element_type == STRING else struct.calcsize(f"<{NUMBERS[element_type]}")
        count = self.count(element_bytes, f"elements of {key}")
        if count > MOST_ELEMENTS:
            raise ArtefactError(f"{self.where}: {key}: {count} elements: expected at most {MOST_ELEMENTS}")
        if element_type == STRING:
            return [self.text() for _ in range(count)]
        return list(struct.unpack(f"<{count}{NUMBERS[element_type]}", self.take(count * element_bytes)))

    def damaged(self, reason: str) -> ArtefactError:
        return ArtefactError(f"{self.where}: not a whole GGUF file ({reason})")


def described_gguf(content: bytes, file_bytes: int, where: str) -> tuple[Any, ...] | None:
    """Returns what an import needs of a GGUF file but the weights; None: the header goes on behind `content`.

    The result is (content of config.json, options of `ModelConfig`, fields of `Architecture`, tokenizer, name of its
    file, chat template or "", tensors). A tensor is [name, type, sizes (slowest axis first), byte offset in the file,
    bytes].

    Args:
        content: the first bytes of the file.
        file_bytes: size of the file.
        where: path of the file, for messages.

    Raises:
        ArtefactError: the file is damaged, or holds an option or a tokenizer that ours lacks; names it.
    """
    source = _Bytes(content, file_bytes, where)
    try:
        fields, tensors = _header(source)
    except _MoreNeededError:
        return None

    shapes = {name: tuple(sizes) for name, _, sizes, _, _ in tensors}
    config = _config(fields, shapes, where)
    model, architecture = model_of(config, "imported", where)
    tokenizer, file_name = tokenizer_file(fields, where)
    template = fields.get("tokenizer.chat_template") or ""
    if not isinstance(template, str):
        raise ArtefactError(f"{where}: tokenizer.chat_template={shown_value(template)}: expected a text")
    return config, asdict(model), asdict(architecture), tokenizer, file_name, template, tensors


def _header(source: _Bytes) -> tuple[dict[str, Any], list[list[Any]]]:
    """Returns the values by key, and the tensors as `described_gguf` does.

    Raises:
        ArtefactError: the file is damaged, or tensors overlap; names the key or tensor.
        _MoreNeededError: the header goes on behind the bytes that were given.
    """
    if source.take(len(MAGIC)) != MAGIC:
        raise source.damaged("its first bytes are not GGUF")
    version = source.number("I")
    if version not in VERSIONS:
        raise source.damaged(f"version {version}: expected 2 or 3, little-endian")
    tensor_count = source.count(24, "tensors")
    key_count = source.count(13, "keys")
    if tensor_count > MOST_TENSORS:
        raise ArtefactError(f"{source.where}: the header has {tensor_count} tensors: expected at most {MOST_TENSORS}")

    fields: dict[str, Any] = {}
    for _ in range(key_count):
        key = source.text()
        if key in fields:
            raise ArtefactError(f"{source.where}: it has the key {shown_value(key)} twice")
        fields[key] = source.value(source.number("I"), shown_value(key))

    tensors = [_tensor(source) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ArtefactError(
            f"{source.where}: general.alignment={shown_value(alignment)}: expected a power of two up to {1 << 20}"
        )
    # Offsets in the header count from here.
    start = -(-source.position // alignment) * alignment
    for tensor in tensors:
        if tensor[3] % alignment:
            raise ArtefactError(
                f"{source.where}: tensor {shown_value(tensor[0])}: offset {tensor[3]}: expected a multiple of "
                f"general.alignment={alignment}"
            )
        tensor[3] += start
    _check_places(tensors, source)
    return fields, tensors


def _tensor(source: _Bytes) -> list[Any]:
    """Returns the next tensor as `described_gguf` does, with its offset in the data.

    Raises:
        ArtefactError: it has an unknown type, too many dimensions, or rows that are no multiple of the type's blocks.
        _MoreNeededError: as `_header`.
    """
    import gguf

    name = source.text()
    where = f"{source.where}: tensor {shown_value(name)}"
    dimensions = source.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ArtefactError(f"{where}: {dimensions} dimensions: expected 1 to {MOST_DIMENSIONS}")
    sizes = [source.number("Q") for _ in range(dimensions)]
    type_number, offset = source.number("I"), source.number("Q")

    sizes_of_types = {int(kind): numbers for kind, numbers in gguf.GGML_QUANT_SIZES.items()}
    if type_number not in sizes_of_types:
        raise ArtefactError(f"{where}: type {type_number}: expected a type that the package gguf knows")
    block, block_bytes = sizes_of_types[type_number]
    if sizes[0] % block:
        raise ArtefactError(f"{where}: rows of {sizes[0]}: expected a multiple of {block}, the block of its type")
    n_bytes = block_bytes * (sizes[0] // block)
    for size in sizes[1:]:
        n_bytes = min(n_bytes * size, 1 << 63)  # a size too large for the file, whatever the others are
    return [name, type_number, sizes[::-1], offset, n_bytes]


def _check_places(tensors: list[list[Any]], source: _Bytes) -> None:
    """Refuses tensors with equal names, with common bytes, or that reach over the end of the file.

    Raises:
        ArtefactError: names the tensor.
    """
    names: set[str] = set()
    previous_end, previous_name = 0, ""
    for name, _, sizes, begin, n_bytes in sorted(tensors, key=lambda tensor: (tensor[3], tensor[0])):
        where = f"{source.where}: tensor {shown_value(name)}"
        if name in names:
            raise ArtefactError(f"{where} is there twice")
        names.add(name)
        if begin + n_bytes > source.file_bytes:
            raise source.damaged(f"tensor {shown_value(name)} of {sizes} reaches over its end")
        if begin < previous_end:
            raise ArtefactError(f"{where}: its bytes are those of {shown_value(previous_name)}, too")
        previous_end, previous_name = begin + n_bytes, name


def _config(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, Any]:
    """Returns the file's shape as config.json.

    Args:
        shapes: shapes of its tensors by name, slowest axis first.

    Raises:
        ArtefactError: another architecture, or an option that the model lacks; names it.
    """
    architecture = fields.get("general.architecture")
    families = {NAMES[family]: family for family in READ}
    if not isinstance(architecture, str) or architecture not in families:
        expected = ", ".join(families)
        raise ArtefactError(f"{file}: general.architecture={shown_value(architecture)}: expected one of {expected}")

    prefix = f"{architecture}."
    options = {key.removeprefix(prefix): option for key, option in fields.items() if key.startswith(prefix)}
    for key, option in options.items():
        # An option that is passed over would change what the model computes.
        if key not in SIZES and key not in DERIVED:
            raise ArtefactError(
                f"{file}: {prefix}{shown_value(key)}={shown_value(option)}: the model has no such option"
            )
        _check_option(prefix + key, option, LARGEST.get(SIZES.get(key, "")), file)
    for key in REQUIRED:
        if key not in options:
            raise ArtefactError(f"{file}: {prefix}{key} is missing")

    # A file may claim any depth; each layer has several tensors.
    if options["block_count"] > len(shapes):
        raise ArtefactError(f"{file}: {prefix}block_count={options['block_count']}: the file has {len(shapes)} tensors")

    family = FAMILIES[families[architecture]]
    config = {
        "architectures": [f"{families[architecture]}ForCausalLM"],
        "model_type": family.model_type,
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "tie_word_embeddings": "output.weight" not in shapes,
        # GGUF leaves out a base of 10000.
        "rope_theta": 10000.0,
        **{theirs: _shortest(options[key]) for key, theirs in SIZES.items() if key in options},
    }
    for key, tensor in ((family.attention_bias, "attn_q"), (family.ffn_bias, "ffn_up")):
        if isinstance(key, str):
            config[key] = f"blk.0.{tensor}.bias" in shapes

    # Our heads have one width for queries, keys, values and rotary embedding.
    d_head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if options.get(key, d_head) != d_head:
            raise ArtefactError(f"{file}: {prefix}{key}={options[key]}: expected {d_head}, the width of a head")
    return config


def _check_option(key: str, option: Any, largest: int | None, file: str) -> None:
    """Refuses an option that is no positive number, or a size above `largest`; None: any positive number.

    Raises:
        ArtefactError: names the key.
    """
    accepted = "a positive number"
    fits = type(option) in (int, float) and 0 < option <= 1e30
    if largest is not None:
        accepted = f"an integer from 1 to {largest}"
        fits = type(option) is int and 1 <= option <= largest
    if not fits:
        raise ArtefactError(f"{file}: {key}={shown_value(option)}: expected {accepted}")


def _shortest(number: Any) -> Any:
    """Returns an fp32 number as people write it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(number))) if isinstance(number, float) else number
