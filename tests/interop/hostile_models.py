"""A small model as a folder of transformers and as a GGUF file, and damaged copies of their files."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from dist_lm.interop.gguf_file import write_gguf
from dist_lm.interop.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, tokenizer_file
from dist_lm.interop.weights import converted
from dist_lm.model.size import parameter_shapes
from dist_lm.stages.exporting.files import write_model
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.interop.hf_models import architecture, our_model, small
from tests.tokenizer.made_json import trained_json

VOCAB_SIZE = 300
IDS = {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": 0}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUMBERS = (0, -1, 1, 3, 7, 10**8, 10**11, 2**31, 2**63 - 1, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"))
VALUES = (
    *NUMBERS,
    None,
    True,
    "",
    "yarn",
    "\n\x1b]0;title\x07",
    "9" * 5000,
    "\ud800",
    [],
    {},
    [[]],
    ["a"],
    {"a": {}},
    [10**11],
)
Spoil = Callable[[bytes, Random], bytes]


def write_folder(folder: Path) -> Path:
    """Writes a model of Llama with a byte-level tokenizer, as transformers saves one."""
    model = our_model(small("Llama 3.1", vocab_size=VOCAB_SIZE))
    folder.mkdir(parents=True)
    write_model(folder, model.config, model.state_dict().__getitem__, "bf16", IDS)
    (folder / "tokenizer.json").write_bytes(trained_json(["a b def f(x):"], VOCAB_SIZE - 4))
    settings = {
        "add_bos_token": True,
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|endoftext|>",
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>"}},
        "chat_template": [{"name": "default", "template": TEMPLATE}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def sentencepiece_model() -> bytes:
    """A tokenizer.model of SentencePiece's BPE with bytes, as of Llama 2."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "\u2581", "\u2581ab"]
    pieces = len(tokens) - 259
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * pieces]
    scores = [0.0] * 259 + [-float(place) for place in range(pieces)]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    content, _ = tokenizer_file({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, "seed")
    return content


def write_gguf_file(path: Path) -> Path:
    """Writes the model of `write_folder`, without scaled positions, for llama.cpp."""
    (path.parent / "tokenizer.json").write_bytes(trained_json(["a b def f(x):"], VOCAB_SIZE))
    tokenizer = Tokenizer.load(path.parent / "tokenizer.json")
    model = our_model(small("Llama", d_model=20, n_heads=5, d_ff=24, vocab_size=VOCAB_SIZE))
    found = architecture(model.config)
    tensors = converted(found, parameter_shapes(model.config))
    write_gguf(path, "F16", model.config, found, tensors, model.state_dict().__getitem__, tokenizer, TEMPLATE)
    return path


def flipped(content: bytes, random: Random) -> bytes:
    """A few bits flipped, or bytes left out, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        if not changed:
            break
        place = random.randrange(len(changed))
        action = random.randrange(8)
        if action < 5:
            changed[place] ^= 1 << random.randrange(8)
        elif action == 5:
            del changed[place : place + random.randrange(1, 9)]
        elif action == 6:
            changed[place:place] = changed[place : place + random.randrange(1, 99)]
        else:
            del changed[max(1, place) :]
    return bytes(changed)


def numbers_replaced(content: bytes, random: Random) -> bytes:
    """Eight or four bytes somewhere are a number that a header may have, or may claim."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 3))):
        code = random.choice("QI")
        number = random.choice((0, 1, 7, 255, 10**4, 10**6, 2**31, 2**32 - 1, 10**11, 2**62, 2**64 - 1))
        place = random.randrange(len(changed) - 8)
        struct.pack_into(f"<{code}", changed, place, number % (1 << (64 if code == "Q" else 32)))
    return bytes(changed)


def values_replaced(content: bytes, random: Random) -> bytes:
    """One or two values of a JSON document are others, or gone, or it is nested deeply."""
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            break
        container, key = random.choice(places)
        action = random.randrange(8)
        if action == 0:
            del container[key]
        elif action == 1:
            container[key] = copy.deepcopy(random.choice(places)[0])
        else:
            container[key] = copy.deepcopy(random.choice(VALUES))
    text = json.dumps(value)
    if random.randrange(20) == 0:
        text = text.replace(":", ":" + "[" * 100_000, 1)
    return text.encode()


def _places(value: Any, depth: int = 0) -> Any:
    """Yields (container, key) of the values of a JSON document; of a long list or object only the first ones."""
    keys = list(value)[:40] if isinstance(value, dict) else range(min(len(value), 3))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list) and depth < 4:
            yield from _places(value[key], depth + 1)


def header_replaced(content: bytes, random: Random) -> bytes:
    """A safetensors file with another header, whose length is right."""
    length = int.from_bytes(content[:8], "little")
    header = random.choice((values_replaced, flipped))(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
