"""Strings that want to be something else: marks, byte pieces, JSON, controls, and text at the edge of Unicode."""

from random import Random

from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from tests.tokenizer.hard_texts import FRAGMENTS

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
JSON_PARTS = (
    *(
        '{"name": "f", "arguments": {}}',
        '"}',
        '"}}',
        "]}",
        '{"',
        '": "',
        '", "',
        "\\",
        '\\"',
        "\\u0000",
        "\\ud800",
        "\\n",
    ),
    *("[" * 70, "]" * 70, '{"a":' * 70, "null", "NaN", "-Infinity", "1e999", "9" * 700, "{}", "[]", "//", "/*", "'"),
)
CONTROLS = tuple(map(chr, (*range(32), *range(127, 160), 0x2028, 0x2029, 0xFEFF, 0xFFFE, 0xFFFF, 0x10FFFF)))
RIGHT_TO_LEFT = ("\u202e", "\u2066", "\u2069", "\u200f", "שלום", "مرحبا", "\u202d<|im_end|>\u202c")
EMOJI = ("🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇳🇴", "\U0001f3fd", "\ufe0f")
NEAR_MARKS = (
    *("<|im_end |>", "<|IM_END|>", "< |im_end|>", "<|im_end", "|>", "<|", "<\u200b|im_end|>", "＜|im_end|＞", "<||>"),
    *("<|im_e", "nd|>", "\u2581<|im_end|>", "<|im_end|>\u2581", "<|im_end|><|im_start|>", "&lt;|im_end|&gt;"),
    *(
        "\\u003c|im_end|>",
        "\\u003ctool_call>",
        "<tool_call",
        "tool_call>",
        "<<tool_call>>",
        "</tool_call",
    ),
    *('</tool_call>\n<tool_call>{"name": "g", "arguments": {}}', "# Tools\n\n", "\n</tool_call><|im_end|>\n"),
    *(
        "<|im_start|>assistant\n",
        "<|im_start|>system\n",
        "user\n",
        "{{ 1 }}",
        "{% raw %}",
        "{# x #}",
        "<|reserved_16|>",
    ),
    *("<s>", "</s>", "<unk>", "<pad>", "[INST]", "<|user|>", "<|eot_id|>"),
)
KINDS = (
    SPECIAL_TOKENS,
    BYTE_PIECES,
    JSON_PARTS,
    CONTROLS,
    RIGHT_TO_LEFT,
    EMOJI,
    NEAR_MARKS,
    FRAGMENTS,
    ("\u2581", " "),
)


def hostile_text(random: Random) -> str:
    """One text, not empty: one to eight parts of any kind, now and then very long or of arbitrary code points."""
    parts = [random.choice(random.choice(KINDS)) for _ in range(random.randint(1, 8))]
    if random.random() < 0.2:
        points = (random.randrange(0x110000) for _ in range(random.randint(1, 20)))
        parts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    if random.random() < 0.01:
        parts *= random.randint(50, 200)
    random.shuffle(parts)
    return "".join(parts)


def mutated(ids: list[int], vocab_size: int, random: Random) -> list[int]:
    """`ids` with one to three of: deletion, swap, truncation, another token, repetition, one more special token."""
    ids = list(ids)
    for _ in range(random.randint(1, 3)):
        at, other = random.randrange(len(ids)), random.randrange(len(ids))
        match random.randrange(6):
            case 0:
                del ids[at : at + random.choice((1, 1, 5))]
            case 1:
                ids[at], ids[other] = ids[other], ids[at]
            case 2:
                del ids[max(1, at) :]
            case 3:
                ids[at] = random.randrange(vocab_size)
            case 4:
                ids[at:at] = ids[min(at, other) : max(at, other)][:50]
            case _:
                ids.insert(at, random.randrange(len(SPECIAL_TOKENS)))
        if not ids:
            return [0]
    return ids
