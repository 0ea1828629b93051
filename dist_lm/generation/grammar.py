"""Which tokens may come next in an answer with a constraint: a function of the constraint and the tokens so far.

llguidance follows the grammar (https://github.com/guidance-ai/llguidance). Where it forces bytes, it allows the token
that the tokenizer would choose for them, so that an answer has the tokens that such a text has in training.

Dimensions: U bytes with one bit for each token of the vocabulary.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import metadata
from typing import Any, NamedTuple, cast

import numpy as np

from dist_lm.errors import UserError
from dist_lm.generation.constraint import Constraint, GrammarRecord, Kind
from dist_lm.generation.schema_keywords import bounded, check_schema
from dist_lm.sandbox import limited
from dist_lm.tokenizer.tokenizer import Tokenizer

SHORT_BYTES, SHORT_TEXTS = 64, 4096  # longest forced texts whose tokens are remembered, and how many
KEPT = 64  # grammars that an engine keeps for the next request
# Between items and behind keys, as `json.dumps` writes; no other white space, of which a model might write without end.
JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": True,  # `check_schema` has found that only one branch can fit
}
NO_TEXT = b"\xff"  # llguidance reads a token that begins with this byte as a special one, which no text has


class GrammarError(UserError):
    """A constraint that cannot be read, or that no token fulfils."""


@cache
def library_version() -> str:
    """Returns the version of llguidance, which must be installed."""
    return metadata.version("llguidance")


class _Compiled(NamedTuple):
    """A constraint as llguidance follows it."""

    state: Any  # `LLMatcher` before the first token
    grammar_sha256: str  # hash of the grammar that the library was given


class Matcher:
    """The tokens that may come next in one answer."""

    def __init__(self, state: Any, end: int, ends: Sequence[int], vocab_size: int, record: GrammarRecord) -> None:
        """
        Args:
            state: an `LLMatcher` before the first token, of this matcher alone.
            end: the token with which llguidance ends a text.
            ends: the tokens that end the answer in its place; they are allowed once the constraint is fulfilled, and
                never before.
            record: identifies the grammar.
        """
        self.record = record
        self._state = state
        self._end = end
        self._ends = np.array(ends, np.int64)
        self._vocab_size = vocab_size

    def allowed(self) -> np.ndarray:
        """Returns the tokens that may come next, (U,) uint8: bit t % 8 of byte t // 8 is that of token t.

        Raises:
            GrammarError: no token may, or the grammar takes too much work.
        """
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)[: -(-self._vocab_size // 8)].copy()
        if self._state.is_error():
            raise GrammarError(f"constraint: {_line(self._state.get_error())}")

        is_fulfilled = bool(bits[self._end // 8] >> self._end % 8 & 1)
        for token in (self._end, *self._ends.tolist()):
            bits[token // 8] &= ~np.uint8(1 << token % 8)
        if is_fulfilled:
            np.bitwise_or.at(bits, self._ends // 8, (1 << self._ends % 8).astype(np.uint8))
        if not bits.any():
            raise GrammarError("constraint: no token of the vocabulary continues the answer")
        return bits

    def take(self, token: int) -> None:
        """Moves on behind a token that does not end the answer.

        Raises:
            GrammarError: the token is not allowed.
        """
        if not self._state.consume_token(token):
            raise GrammarError(f"constraint: token {token} is not allowed: {_line(self._state.get_error())}")


def only_token(allowed_U: np.ndarray) -> int | None:
    """Returns the only token in what `Matcher.allowed` returns; None if there are several."""
    (nonzero_bytes,) = allowed_U.nonzero()
    if len(nonzero_bytes) != 1:
        return None
    bits = int(allowed_U[nonzero_bytes[0]])
    if bits.bit_count() != 1:
        return None
    return 8 * int(nonzero_bytes[0]) + bits.bit_length() - 1


def allows(allowed_U: np.ndarray, token: int) -> bool:
    """Returns whether what `Matcher.allowed` returns has the token."""
    return bool(allowed_U[token // 8] >> token % 8 & 1)


class Grammars:
    """Makes matchers for the answers of one tokenizer. Grammars that were used last are kept. For any thread."""

    def __init__(self, load: Callable[[], Tokenizer], *, untrusted: bool = False) -> None:
        """
        Args:
            load: returns the tokenizer; called once, for the first constraint.
            untrusted: constraints come from strangers: each is compiled first in the process with limits, because the
                library ends its process on some.
        """
        self._load = load
        self._untrusted = untrusted
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._library_tokenizer: Any = None
        self._kept: OrderedDict[Constraint, _Compiled] = OrderedDict()

    def matcher(self, constraint: Constraint, ends: Sequence[int]) -> Matcher:
        """Returns a matcher at the beginning of an answer.

        Args:
            ends: the tokens that end the answer.

        Raises:
            GrammarError: the constraint cannot be read, or takes too much work.
            SchemaError: it is a schema with a keyword that answers would not hold to.
            UserError: the package llguidance is not installed.
        """
        self.prepare(constraint)
        with self._lock:
            compiled = self._kept[constraint]
            state = compiled.state.deep_copy()
        tokenizer = self._tokenizer
        assert tokenizer, "loaded for the first grammar"

        identity = json.dumps([compiled.grammar_sha256, tokenizer.sha256, sorted({*ends})])
        record = GrammarRecord(library_version(), hashlib.sha256(identity.encode()).hexdigest())
        return Matcher(state, tokenizer.eot_id, ends, tokenizer.vocab_size, record)

    def has(self, constraint: Constraint) -> bool:
        """Returns whether a constraint is compiled."""
        with self._lock:
            return constraint in self._kept

    def prepare(self, constraint: Constraint) -> None:
        """Compiles a constraint, so that the next `matcher` takes no time.

        Raises:
            GrammarError, SchemaError, UserError: as `matcher`.
        """
        with self._lock:
            if constraint in self._kept:
                self._kept.move_to_end(constraint)
                return
            if self._tokenizer is None:
                self._tokenizer = self._load()
                self._library_tokenizer = _library_tokenizer(_Wrapped(self._tokenizer))

        # Outside of the lock: others use their grammars meanwhile.
        if self._untrusted:
            try:
                limited.call(try_constraint, constraint.kind, constraint.text, self._tokenizer.vocab_size)
            except limited.LimitError as error:
                raise GrammarError(f"constraint.{constraint.kind}: compiling it {error}") from error
        compiled = _compiled(constraint, self._library_tokenizer)
        with self._lock:
            self._kept[constraint] = compiled
            self._kept.move_to_end(constraint)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)


def try_constraint(kind: Kind, text: str, vocab_size: int) -> None:
    """Compiles a constraint and asks for its first tokens; for the process with limits.

    The vocabulary has bytes alone: what ends the library is in the constraint.

    Raises:
        GrammarError, SchemaError, UserError: as `Grammars.matcher`.
    """
    compiled = _compiled(Constraint(kind, text), _byte_tokenizer(vocab_size))
    compiled.state.compute_bitmask()


@lru_cache
def _byte_tokenizer(vocab_size: int) -> Any:
    return _library_tokenizer(_Bytes(vocab_size))


def _library_tokenizer(wrapped: "_Wrapped | _Bytes") -> Any:
    """Returns an `LLTokenizer`.

    Raises:
        UserError: the package llguidance is not installed.
    """
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise UserError(
            "constraints need the package llguidance: pip install llguidance, or install dist_lm again"
        ) from error
    return LLTokenizer(TokenizerWrapper(wrapped))


def _compiled(constraint: Constraint, library_tokenizer: Any) -> _Compiled:
    """Compiles a constraint.

    Raises:
        GrammarError: the constraint cannot be read, or takes too much work.
        SchemaError: it is a schema with a keyword that answers would not hold to.
    """
    from llguidance import LLMatcher, LLParserLimits

    if constraint.kind == "json_schema":
        schema = json.loads(constraint.text)
        check_schema(schema)
        # A schema may have options of the library in it.
        try:
            grammar = LLMatcher.grammar_from_json_schema(bounded(schema), overrides=cast(Any, JSON_OPTIONS))
        except ValueError as error:  # such as an integer of more than 64 bits
            raise GrammarError(f"constraint.json_schema: {_line(str(error))}") from error
    elif constraint.kind == "regex":
        grammar = LLMatcher.grammar_from_regex(constraint.text)
    elif constraint.kind == "choice":
        texts = " | ".join(json.dumps(text) for text in json.loads(constraint.text))
        grammar = LLMatcher.grammar_from_lark(f"start: {texts}")
    else:
        grammar = LLMatcher.grammar_from_lark(constraint.text)

    # Verbose errors quote the state of the parser.
    limits = LLParserLimits(verbose_errors=False)
    state = LLMatcher(library_tokenizer, grammar, log_level=0, limits=limits)
    if state.is_error():
        raise GrammarError(f"constraint.{constraint.kind}: {_line(state.get_error())}")
    if warnings := state.get_grammar_warnings():
        raise GrammarError(f"constraint.{constraint.kind}: {_line('; '.join(warnings))}")
    return _Compiled(state, hashlib.sha256(grammar.encode(errors="surrogatepass")).hexdigest())


class _Bytes:
    """A vocabulary of the 256 bytes and of tokens without text, as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, vocab_size: int) -> None:
        names = (NO_TEXT + f"<[{token}]>".encode() for token in range(256, max(vocab_size, 257)))
        self.tokens = [*(bytes([value]) for value in range(256)), *names]
        self.special_token_ids = [*range(256, len(self.tokens))]
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, content: bytes) -> list[int]:
        return list(content)


class _Wrapped:
    """A tokenizer as llguidance asks for it. Its attributes have the names that the library reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.vocabulary()
        self._tokenizer = tokenizer
        self._ids = {content: token for token, content in reversed(list(enumerate(vocabulary))) if content}
        self._longest = max(map(len, self._ids))
        # Names of keys and the signs between them come back with each object.
        self._tokens_of_short = lru_cache(SHORT_TEXTS)(self._tokens_of)
        self.eos_token_id = tokenizer.eot_id
        # A token without text, such as a mark, has a name that no text can have.
        self.tokens = [content or NO_TEXT + f"<[{token}]>".encode() for token, content in enumerate(vocabulary)]
        self.special_token_ids = [token for token, content in enumerate(vocabulary) if not content]

    def __call__(self, content: bytes) -> list[int]:
        """Returns the tokens of forced bytes, which may end inside a character."""
        if len(content) <= SHORT_BYTES:
            return [*self._tokens_of_short(content)]
        return [*self._tokens_of(content)]

    def _tokens_of(self, content: bytes) -> Sequence[int]:
        try:
            tokens = self._tokenizer.encode(content.decode())
        except UnicodeDecodeError:
            return self._longest_tokens(content)
        # Some tokenizers put a space before each text, or normalise it.
        return tokens if self._tokenizer.content(tokens) == content else self._longest_tokens(content)

    def _longest_tokens(self, content: bytes) -> list[int]:
        """Returns tokens for any bytes: from the left, each time the longest that fits; ends where none does."""
        tokens: list[int] = []
        start = 0
        while start < len(content):
            ends = range(min(len(content), start + self._longest), start, -1)
            stop = next((end for end in ends if content[start:end] in self._ids), start)
            if stop == start:
                break
            tokens.append(self._ids[content[start:stop]])
            start = stop
        return tokens


def _line(text: str) -> str:
    """Returns a message of the library in one line, of at most 300 characters."""
    return " ".join(text.split())[:300]
