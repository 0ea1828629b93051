"""A reader that notes the node of the task that reads, and goes on when two nodes read at once."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.document import Document

NODES = 2
DEADLINE_S = 300


@reader(keys=("language", "licence", "subset", "data_dir"))
def read_on_node(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Yields forty texts with the word `source.subset`; notes the node of a job in the folder `source.data_dir`."""
    if node := os.environ.get("SLURMD_NODENAME"):
        folder = Path(source.data_dir)
        (folder / node).touch()
        deadline = time.monotonic() + DEADLINE_S
        while len(list(folder.iterdir())) < NODES and time.monotonic() < deadline:
            time.sleep(0.1)

    for number in range(40):
        words = " ".join(f"word{number * 20 + place}{source.subset}" for place in range(20))
        text = f"{source.subset} {number}: {words}\n"
        yield Document(text, source.language, f"{source.subset}:{number}", source.licence, text_hash(text))
