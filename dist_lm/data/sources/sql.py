"""Generated SQL: schemas of many trades and statements about them, each run by SQLite before it counts.

Everything hangs on the seed, so the same seed gives the same documents on every machine.
"""

import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.candidate import Candidate, Rejected, text_hash
from dist_lm.data.sources.sql_analyses import ANALYSES
from dist_lm.data.sources.sql_queries import QUERIES
from dist_lm.data.sources.sql_scene import Scene, spoken
from dist_lm.data.sources.sql_schema import random_schema
from dist_lm.data.sources.sql_statements import CHANGES, create_table, insert_rows
from dist_lm.data.sources.sql_style import Style
from dist_lm.document import Document

DEFAULT_DOCUMENTS = 600  # about 1.0 MB
MADE = re.compile(r"(CREATE \w+|ALTER TABLE \w+ ADD COLUMN) \w+")  # what can be made only once
SHORTEST, LONGEST = 500, 2600  # characters aimed at


def read_sql(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """`source.limit` documents (0: about a megabyte), numbered; document i depends on `(seed, i)` alone."""
    for i in range(source.limit or DEFAULT_DOCUMENTS):
        text = sql_document(random.Random(f"sql {seed} {i}"))  # noqa: S311  (text, not secrets)
        name = f"generated:sql:seed={seed}:{i}"
        if executes(text):
            yield Document(text, source.language, name, source.licence, text_hash(text))
        else:
            yield Rejected(source.language, name, "invalid_sql")


def sql_document(rng: random.Random) -> str:
    """A schema, rows for it, and statements about it, in the style of one author."""
    trade, tables = random_schema(rng)
    scene = Scene(rng, tables, Style.random(rng))
    style = scene.style
    size = rng.randint(SHORTEST, LONGEST)
    parts = []
    if rng.random() < 0.4 and style.comments != "none":
        parts.append(style.comment(f"{spoken(trade)}: {', '.join(spoken(table.name) for table in tables)}").rstrip())
    parts += [style.finish(create_table(scene, table)) for table in tables]
    filled = rng.randint(0, len(tables))  # parents stand before children, and are filled first
    for table in tables[:filled]:
        parts += map(style.finish, insert_rows(scene, table, 1, rng.randint(1, 4)))
    seen: set[str] = set()  # statements, and names of what they make
    while sum(len(part) + 2 for part in parts) < size:
        write = rng.choice(rng.choices([QUERIES, ANALYSES, CHANGES], weights=[35, 35, 30])[0])
        statement = write(scene)
        if statement is None or statement[1] in seen:
            continue
        words, text = statement
        made = MADE.match(text)
        if made and made.group() in seen:
            continue
        seen |= {text, made.group()} if made else {text}
        comment = style.comment(words) if rng.random() < 0.6 else ""
        parts.append(comment + style.finish(text))
    between = rng.choice(["\n\n", "\n\n", "\n"])
    return between.join(parts) + "\n"


def executes(text: str) -> bool:
    """Whether SQLite runs the whole script on an empty database."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.executescript(text)
        except sqlite3.Error:
            return False
    return True
