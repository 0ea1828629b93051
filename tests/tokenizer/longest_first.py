"""How llama.cpp finds symbols."""

from dist_lm.tokenizer.symbols import SPACE, user_defined_symbols
from dist_lm.tokenizer.tokenizer import Tokenizer


def longest_first(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids as llama.cpp finds them: the longest symbols are cut out of the whole text first, then shorter ones."""
    fragments: list[str | int] = [text]
    for symbol in sorted((symbol.replace(SPACE, " ") for symbol in user_defined_symbols()), key=len, reverse=True):
        (number,) = tokenizer.encode(symbol)
        cut: list[str | int] = []
        for fragment in fragments:
            parts = fragment.split(symbol) if isinstance(fragment, str) else [fragment]
            cut += [one for part in parts for one in (part, number)][:-1]
        fragments = cut
    return [
        token
        for fragment in fragments
        for token in (tokenizer.encode(fragment) if isinstance(fragment, str) else [fragment])
    ]
