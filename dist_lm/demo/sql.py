"""Generated SQL: schemas of many trades and statements about them.

Document i depends on (seed, i) alone, so it is the same on every machine. A test runs the documents with SQLite.
"""

import random
import re
from collections.abc import Iterator

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.demo.sql_analyses import ANALYSES
from dist_lm.demo.sql_queries import QUERIES
from dist_lm.demo.sql_scene import Scene, Style, spoken
from dist_lm.demo.sql_schema import random_schema
from dist_lm.demo.sql_statements import CHANGES, create_table, insert_rows
from dist_lm.document import Document

DEFAULT_DOCUMENTS = 600  # about 1.0 MB
MADE = re.compile(r"(CREATE \w+|ALTER TABLE \w+ ADD COLUMN) \w+")  # a document makes each name once
SHORTEST, LONGEST = 500, 2600  # characters aimed at


@reader(seeded=True, revision=1)
def read_sql(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """`source.limit` documents (0: `DEFAULT_DOCUMENTS`)."""
    for i in range(source.limit or DEFAULT_DOCUMENTS):
        text = sql_document(random.Random(f"sql {seed} {i}"))  # noqa: S311  (text, not secrets)
        yield Document(text, source.language, f"generated:sql:seed={seed}:{i}", source.licence, text_hash(text))


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
    filled = rng.randint(0, len(tables))  # parents come before children and get their rows first
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
