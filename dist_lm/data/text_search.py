"""Finds a text in the documents of a corpus, whatever tokens it is made of: tokens become bytes again."""

from collections.abc import Iterator, Sequence

import numpy as np

from dist_lm.data.order import DocumentSlice
from dist_lm.data.token_corpus import TokenCorpus


class ByteTable:
    """The bytes of every token, to turn many tokens into text at once."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        """`vocabulary`: the bytes of each token, by id; special ones have none."""
        self.lengths = np.array([len(token) for token in vocabulary], np.int64)  # (V,)
        self._starts = np.cumsum(self.lengths) - self.lengths  # (V,)
        self._bytes = np.frombuffer(b"".join(vocabulary), np.uint8)

    def text(self, tokens: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Returns the bytes of tokens (n,), and the position behind each token in them: (n,) int64."""
        lengths = self.lengths[tokens]
        ends = np.cumsum(lengths)
        if not len(ends):
            return b"", ends
        # The k-th byte of a token is the k-th behind its start in the table.
        index = np.repeat(self._starts[tokens] - (ends - lengths), lengths)
        index += np.arange(len(index))
        return self._bytes[index].tobytes(), ends


def find_text(corpus: TokenCorpus, text: bytes, table: ByteTable) -> Iterator[DocumentSlice]:
    """Yields the tokens of each place in a corpus that holds a text, in the order of the documents. Places may overlap.

    A place lies inside one document, and no special token is in it. Reads the whole split.

    Args:
        text: at least one byte of UTF-8.

    Raises:
        ArtefactError: a tar is damaged.
    """
    assert text
    for documents, tokens in corpus.members():
        content, byte_ends = table.text(tokens)
        token_ends = np.cumsum(corpus.lengths[documents.start : documents.stop])
        is_special = table.lengths[tokens] == 0

        at = content.find(text)
        while at >= 0:
            # The token that holds the first byte, and the one behind that of the last.
            first = int(np.searchsorted(byte_ends, at, side="right"))
            stop = int(np.searchsorted(byte_ends, at + len(text) - 1, side="right")) + 1
            document = int(np.searchsorted(token_ends, first, side="right"))
            if stop <= token_ends[document] and not is_special[first:stop].any():
                begin = int(token_ends[document - 1]) if document else 0
                yield DocumentSlice(documents.start + document, first - begin, stop - begin)
            at = content.find(text, at + 1)
