"""What an answer must be: a JSON value of a schema, a text of a regular expression or a grammar, or one of some texts.

As JSON, a constraint is an object with one key:

    {"json_schema": {"type": "object", ...}}
    {"regex": "[0-9]{4}-[0-9]{2}"}
    {"lark": "start: \"yes\" | \"no\""}
    {"choice": ["yes", "no"]}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from dist_lm.errors import ConfigError, require

Kind = Literal["json_schema", "regex", "lark", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_BYTES = 256 << 10  # size of a constraint, as JSON in UTF-8


@dataclass(frozen=True)
class Constraint:
    """A constraint of an answer. Equal constraints have equal texts."""

    kind: Kind
    text: str  # regular expression or grammar; a schema, and a list of texts, as JSON

    @classmethod
    def from_json(cls, value: Any) -> "Constraint":
        """Returns the constraint that a JSON value describes. Whether a grammar can be read is not checked.

        Raises:
            ConfigError: `value` is no object with one known key, its value has another type, or it is too long.
        """
        accepted = f"an object with one of {', '.join(KINDS)}"
        if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
            raise ConfigError(f"constraint: {_shown(value)}; expected {accepted}")
        ((kind, described),) = value.items()

        key = f"constraint.{kind}"
        if kind == "json_schema":
            require(isinstance(described, dict | bool), key, _shown(described), "an object")
            text = json.dumps(described, ensure_ascii=False)
        elif kind == "choice":
            require(_are_texts(described), key, _shown(described), "texts, at least one")
            text = json.dumps(list(described), ensure_ascii=False)
        else:
            require(isinstance(described, str) and described != "", key, _shown(described), "a text")
            text = described

        n_bytes = len(text.encode(errors="surrogatepass"))
        require(n_bytes <= MOST_BYTES, key, f"{n_bytes:,} bytes", f"at most {MOST_BYTES:,}")
        return cls(kind, text)


class GrammarRecord(NamedTuple):
    """Identifies the grammar that an answer followed. Equal records allow the same tokens after the same tokens."""

    library: str  # version of llguidance
    sha256: str  # hash of the grammar, the tokenizer and the tokens that end the answer, hexadecimal


def _are_texts(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and len(value) > 0 and all(isinstance(text, str) for text in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
