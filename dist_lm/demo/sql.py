"""Generated SQL: schemas of many trades and statements about them.

Document i depends on (seed, i) alone, so all machines generate the same text. A test runs the documents with SQLite.
"""

import random
import re
from collections.abc import Iterator

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.demo.sql_scene import Scene, Style, spoken
from dist_lm.demo.sql_schema import random_schema
from dist_lm.document import Document

DEFAULT_DOCUMENTS = 600  # about 1.0 MB
CREATED = re.compile(r"(CREATE \w+|ALTER TABLE \w+ ADD COLUMN) \w+")  # a document creates each name once
SHORTEST, LONGEST = 500, 2600  # characters; a document ends after a length between these


@reader(seeded=True, revision=1)
def read_sql(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Yields `source.limit` documents (0: `DEFAULT_DOCUMENTS`)."""
    for i in range(source.limit or DEFAULT_DOCUMENTS):
        text = sql_document(random.Random(f"sql {seed} {i}"))  # noqa: S311  (text, not secrets)
        yield Document(text, source.language, f"generated:sql:seed={seed}:{i}", source.licence, text_hash(text))


def sql_document(rng: random.Random) -> str:
    """Returns a script: a schema, rows for some of its tables, and statements about it, in the style of one author.

    Its length is drawn from SHORTEST to LONGEST characters and exceeded by the last statement. SQLite runs it.
    """
    # Every command imports the readers that a corpus names; only a build needs the statements.
    from dist_lm.demo.sql_analyses import ANALYSES
    from dist_lm.demo.sql_queries import QUERIES
    from dist_lm.demo.sql_statements import CHANGES, create_table, insert_rows

    trade, tables = random_schema(rng)
    scene = Scene(rng, tables, Style.random(rng))
    style = scene.style

    target_length = rng.randint(SHORTEST, LONGEST)
    parts = []
    if rng.random() < 0.4 and style.comments != "none":
        parts.append(style.comment(f"{spoken(trade)}: {', '.join(spoken(table.name) for table in tables)}").rstrip())

    parts += [style.finish(create_table(scene, table)) for table in tables]

    # Parents come before children and get their rows first.
    num_with_rows = rng.randint(0, len(tables))
    for table in tables[:num_with_rows]:
        parts += map(style.finish, insert_rows(scene, table, 1, rng.randint(1, 4)))

    # Statements are drawn at random, so the same one may come twice; a script has it once.
    used: set[str] = set()  # statements, and the objects that they create
    while sum(len(part) + 2 for part in parts) < target_length:
        write = rng.choice(rng.choices([QUERIES, ANALYSES, CHANGES], weights=[35, 35, 30])[0])
        statement = write(scene)
        if statement is None or statement[1] in used:
            continue

        # SQLite refuses a second object of the same name.
        words, text = statement
        created = CREATED.match(text)
        if created and created.group() in used:
            continue
        used.add(text)
        if created:
            used.add(created.group())

        comment = style.comment(words) if rng.random() < 0.6 else ""
        parts.append(comment + style.finish(text))

    separator = rng.choice(["\n\n", "\n\n", "\n"])
    return separator.join(parts) + "\n"
