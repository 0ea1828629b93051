"""Text of tokens as they come, and the stop texts in it."""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer. Bytes that are not yet a whole character wait for the rest."""

    def __init__(self, vocabulary: Sequence[bytes], stops: Sequence[str]) -> None:
        """`vocabulary`: the bytes of every token; `stops`: texts that end the answer."""
        self._vocabulary = vocabulary
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._longest = max((len(stop) for stop in stops), default=0)
        self._given = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take in a token. Returns new text that no stop text can take back any more."""
        if self.stopped:
            return ""
        before = len(self.text)
        self.text += self._decoder.decode(self._vocabulary[token])
        begin = max(0, before - self._longest + 1)
        found = [at for stop in self._stops if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
        return self._give(len(self.text) if self.stopped else len(self.text) - self._held_back())

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if not self.stopped:
            self.text += self._decoder.decode(b"", final=True)
        return self._give(len(self.text))

    def _give(self, upto: int) -> str:
        new, self._given = self.text[self._given : upto], max(self._given, upto)
        return new

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        return max(
            (length for stop in self._stops for length in range(1, len(stop)) if self.text.endswith(stop[:length])),
            default=0,
        )
