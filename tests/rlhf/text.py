"""Text of the toy's vocabulary, to be learned beside the rollouts."""

from pathlib import Path

import numpy as np

from dist_lm.document import TokenizedDocument
from tests.data.synthetic_corpus import write
from tests.rlhf.toy import EOT, VOCABULARY


def write_text(directory: Path) -> Path:
    """A corpus of documents of 5 to 24 tokens, each of which counts upwards."""
    made = []
    for i in range(60):
        tokens = [EOT, *(1 + (7 * i + k) % (VOCABULARY - 1) for k in range(4 + i % 20))]
        made.append(TokenizedDocument(np.array(tokens, np.uint16), len(tokens), "python", f"/text/{i}", "none", None))
    return write(directory, made)
