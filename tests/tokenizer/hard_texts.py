"""Texts that tokenizers get wrong, and a strategy that mixes them into arbitrary Unicode."""

from hypothesis import strategies as st

from dist_lm.tokenizer.symbols import SPECIAL_TOKENS

FRAGMENTS = (
    *("\u2581", "\u2581\u2581", " \u2581 ", "\u2581=="),  # SentencePiece's own space
    *("\u2585", "\u2047", "\ufffd", "\ufeff", "\u200d", "\u2028", "\u3000", "\x85", "\xa0"),
    *(
        "\0",
        "\x01",
        "\x7f",
        "\r\n",
        "\r",
        "\n",
        "\n\n",
        "\t",
        "\n\t\t\t",
        " ",
        "  ",
        "\n    ",
        "\n" + " " * 23,
    ),
    *SPECIAL_TOKENS[:5],
    *("<|im_end|>", "<|", "|>", "<0x41>", "<0xE2>", "<unk>", "<s>", "</s>"),
    *("#!/bin/bash", "#!/usr/bin/env python3", " == ", "===", "!==", " >= ", "=" * 79, "-" * 79, "->", ":="),
    *("🙂", "👨‍👩‍👧", "é", "e\u0301", "日本語", "עברית", "\U0010ffff", "\ue000", "\U00020000"),
    *("def f(x):", "return", "0123456789", "3.14e-10", "aaaaaaaa", "https://a.b/c?d=e"),
)

any_unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
hard_text = st.lists(st.one_of(st.sampled_from(FRAGMENTS), any_unicode), max_size=12).map("".join)
