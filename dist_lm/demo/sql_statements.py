"""Statements that create the tables of a schema and their rows, and change them.

Each function returns `(description, SQL)`, or None if the schema has no table or column for it. The SQL has no
semicolon. With a decorator a function takes the scene alone; the decorator draws its table and column, or its two
related tables.
"""

# ruff: noqa: S608  (this SQL is text to learn from: nothing in it comes from a user)

from dist_lm.demo.sql_scene import Clause, Scene, Statement, Write, about_column, about_relation, spoken
from dist_lm.demo.sql_schema import QUANTITIES, Column, Table, literal, quoted, singular


def create_table(scene: Scene, table: Table) -> str:
    """Returns CREATE TABLE with keys, checks and defaults, without its semicolon."""
    rng = scene.rng
    style = scene.style
    lines = [f"{table.key} {style.key}"]
    constraints = []

    for column, parent in table.parents:
        # The first row of a table that refers to itself has no parent, so the column may be NULL.
        declaration = f"{column} {style.types['int']}"
        deletions = ["", "", " ON DELETE CASCADE"]
        if parent == table.name:
            deletions.append(" ON DELETE SET NULL")
        elif style.not_null:
            declaration += " NOT NULL"
        lines.append(declaration)

        reference = f"FOREIGN KEY ({column}) REFERENCES {parent} ({scene.table(parent).key}){rng.choice(deletions)}"
        if style.named_constraints:
            reference = f"CONSTRAINT fk_{table.name}_{column} {reference}"
        constraints.append(reference)

    for column in table.columns:
        line = f"{column.name} {style.types[column.kind]}"
        if not column.nullable and (style.not_null or rng.random() < 0.2):
            line += " NOT NULL"

        # Each kind may get the constraint or default that people give it.
        if column.kind in ("code", "email") and rng.random() < 0.5:
            line += " UNIQUE"
        elif column.kind == "flag" and rng.random() < 0.6:
            line += f" DEFAULT {rng.randint(0, 1)}"
        elif column.kind == "choice" and rng.random() < 0.4:
            options = column.arguments[0].split("|")
            line += f" CHECK ({column.name} IN ({', '.join(map(quoted, options))}))"
        elif column.kind == "money" and rng.random() < 0.3:
            line += f" CHECK ({column.name} >= 0)"
        elif column.kind == "moment" and not column.nullable and rng.random() < 0.3:
            line += " DEFAULT CURRENT_TIMESTAMP"

        lines.append(line)

    exists = rng.choice(["", "", "IF NOT EXISTS "])
    body = ",\n".join(style.indent + line for line in lines + constraints)
    return f"CREATE TABLE {exists}{table.name} (\n{body}\n)"


def insert_rows(scene: Scene, table: Table, first: int, count: int) -> list[str]:
    """Returns INSERT statements for rows `first` to `first + count - 1`: one with many rows, or many with one.

    Foreign keys are numbers of earlier rows of this table, or from 1 to the row's own number in another one, which must
    have as many rows. Key values are left to the database in half of the calls.
    """
    rng = scene.rng
    with_key = rng.random() < 0.5
    names = [table.key] * with_key + [column for column, _ in table.parents] + [c.name for c in table.columns]

    rows = []
    for serial in range(first, first + count):
        fields = [str(serial)] * with_key
        for _, parent in table.parents:
            # A row of a table that refers to itself may have only earlier rows as parents.
            if parent == table.name and serial == first:
                fields.append("NULL")
            else:
                fields.append(str(rng.randint(1, max(1, serial - (parent == table.name)))))
        fields += [literal(rng, column, serial) for column in table.columns]
        rows.append(f"({', '.join(fields)})")

    head = f"INSERT INTO {table.name} ({', '.join(names)})"
    if rng.random() < 0.3:
        return [f"{head} VALUES {row}" for row in rows]
    if len(rows) == 1:
        return [f"{head}\nVALUES {rows[0]}"]
    return [f"{head} VALUES\n" + ",\n".join(scene.style.indent + row for row in rows)]


@about_column(QUANTITIES)
def update_rows(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that changes a quantity in the rows that meet a condition."""
    condition, words = scene.predicate(table)
    name = column.name
    change, verb = scene.rng.choice(
        [
            (f"{name} = ROUND({name} * {scene.rng.choice(['1.05', '1.1', '1.2'])}, 2)", "raise"),
            (f"{name} = {literal(scene.rng, column)}", "set"),
            (f"{name} = {name} + {scene.rng.randint(1, 9)}", "increase"),
            (f"{name} = COALESCE({name}, 0)", "fill in"),
        ]
    )

    clauses: list[Clause] = [
        ("UPDATE", [table.name], ""),
        ("SET", [change], ", "),
        ("WHERE", [condition], ""),
    ]

    return f"{verb} the {spoken(name)} of {spoken(table.name)} {words}", scene.style.render(clauses)


@about_relation
def update_from_children(scene: Scene, child: Table, key: str, parent: Table) -> Statement | None:
    """Returns description and SQL of a statement that derives a column of the parents from their children. None if the
    parent has no flag or whole number."""
    if not parent.of({"flag", "int"}):
        return None

    column = scene.rng.choice(parent.of({"flag", "int"}))

    inner: list[Clause] = [
        ("SELECT", ["COUNT(*)"], ""),
        ("FROM", [child.name], ""),
        ("WHERE", [f"{child.name}.{key} = {parent.name}.{parent.key}"], ""),
    ]
    # A flag says whether there are children, not how many.
    if column.kind == "flag":
        inner[0] = ("SELECT", ["COUNT(*) > 0"], "")

    clauses: list[Clause] = [
        ("UPDATE", [parent.name], ""),
        ("SET", [f"{column.name} = {scene.style.block(inner)}"], ""),
    ]
    return f"derive {spoken(column.name)} from the {spoken(child.name)}", scene.style.render(clauses)


def delete_rows(scene: Scene) -> Statement:
    """Returns description and SQL of a statement that deletes the rows that meet some conditions."""
    table = scene.rng.choice(scene.tables)

    conditions = [scene.predicate(table) for _ in range(scene.rng.randint(1, 2))]
    clauses: list[Clause] = [
        ("DELETE FROM", [table.name], ""),
        ("WHERE", [c for c, _ in conditions], " AND "),
    ]
    return f"remove {spoken(table.name)} {' and '.join(w for _, w in conditions)}", scene.style.render(clauses)


@about_relation
def delete_orphans(scene: Scene, child: Table, key: str, parent: Table) -> Statement:
    """Returns description and SQL of a statement that deletes children whose parent is missing."""
    inner: list[Clause] = [("SELECT", [parent.key], ""), ("FROM", [parent.name], "")]
    clauses: list[Clause] = [
        ("DELETE FROM", [child.name], ""),
        ("WHERE", [f"{key} NOT IN {scene.style.block(inner)}"], ""),
    ]
    return f"{spoken(child.name)} whose {singular(parent.name)} is gone", scene.style.render(clauses)


def create_index(scene: Scene) -> Statement:
    """Returns description and SQL of a statement that creates an index, sometimes a partial one."""
    table = scene.rng.choice(scene.tables)
    names = scene.some(table, 2)
    # Foreign keys are indexed more often than other columns, since joins search by them.
    if table.parents and scene.rng.random() < 0.4:
        names = [table.parents[0][0], *names[:1]]

    order = scene.rng.choice(["", "", " DESC"])
    text = f"CREATE INDEX idx_{table.name}_{'_'.join(names)} ON {table.name} ({', '.join(names)}{order})"

    if scene.rng.random() < 0.25:
        condition, words = scene.predicate(table)
        return f"only {spoken(table.name)} {words}", f"{text}\nWHERE {condition}"
    return f"look up {spoken(table.name)} by {' and '.join(map(spoken, names))}", text


def add_column(scene: Scene) -> Statement:
    """Returns description and SQL of a statement that adds a column to a table."""
    table = scene.rng.choice(scene.tables)
    existing = {column.name for column in table.columns}

    options = [
        ("remarks", "note", ""),
        ("updated_at", "moment", ""),
        ("is_archived", "flag", " DEFAULT 0"),
        ("external_code", "code", ""),
        ("weight", "measure", " DEFAULT 0"),
    ]
    # A column that exists cannot be added.
    name, kind, default = scene.rng.choice([option for option in options if option[0] not in existing])
    return (
        f"new column {spoken(name)}",
        f"ALTER TABLE {table.name} ADD COLUMN {name} {scene.style.types[kind]}{default}",
    )


def copy_rows(scene: Scene) -> Statement:
    """Returns description and SQL of a statement that copies the rows that meet a condition to a new table."""
    table = scene.rng.choice(scene.tables)
    condition, words = scene.predicate(table)

    suffix = scene.rng.choice(["archive", "backup", "selected", "snapshot"])

    clauses: list[Clause] = [
        ("SELECT", [table.key, *scene.some(table, 4)], ", "),
        ("FROM", [table.name], ""),
        ("WHERE", [condition], ""),
    ]

    return (
        f"keep {spoken(table.name)} {words}",
        f"CREATE TABLE {table.name}_{suffix} AS\n{scene.style.render(clauses)}",
    )


def upsert(scene: Scene) -> Statement | None:
    """Returns description and SQL of a statement that inserts a row, or changes it if its key exists. None if the table
    drawn has parents or a column that may be NULL."""
    table = scene.rng.choice(scene.tables)
    columns = [column for column in table.columns if not column.nullable]
    # The inserted row must be complete and have no parents, which might be missing.
    if table.parents or len(columns) != len(table.columns):
        return None

    serial = scene.rng.randint(1, 9)
    fields = [str(serial)] + [literal(scene.rng, column, 500 + serial) for column in columns]
    changed = scene.rng.choice(columns).name
    names = [table.key, *(column.name for column in columns)]

    text = f"INSERT INTO {table.name} ({', '.join(names)})\nVALUES ({', '.join(fields)})\n"
    text += f"ON CONFLICT ({table.key}) DO UPDATE SET {changed} = excluded.{changed}"
    return f"add a {spoken(singular(table.name))}, or change its {spoken(changed)}", text


@about_relation
def trigger(scene: Scene, child: Table, key: str, parent: Table) -> Statement | None:
    """Returns description and SQL of a statement that creates a trigger that counts children in a column of their
    parent. None if the parent has no whole number or amount of money."""
    if not parent.of({"int", "money"}):
        return None

    column = scene.rng.choice(parent.of({"int", "money"})).name
    event, row, sign = scene.rng.choice([("INSERT", "new", "+"), ("DELETE", "old", "-")])

    text = (
        f"CREATE TRIGGER {child.name}_after_{event.lower()} AFTER {event} ON {child.name}\n"
        f"FOR EACH ROW\nBEGIN\n{scene.style.indent}UPDATE {parent.name} "
        f"SET {column} = {column} {sign} 1 WHERE {parent.key} = {row}.{key};\nEND"
    )

    return f"keep {spoken(column)} of {spoken(parent.name)} in step", text


def transaction(scene: Scene) -> Statement:
    """Returns description and SQL of a statement that groups an update and a deletion in a transaction."""
    steps = [statement for statement in (update_rows(scene), delete_rows(scene)) if statement]
    body = ";\n".join(text for _, text in steps)
    return "all or nothing", f"BEGIN TRANSACTION;\n{body};\nCOMMIT"


CHANGES: list[Write] = [
    update_rows,
    update_rows,
    update_from_children,
    delete_rows,
    delete_orphans,
    create_index,
    create_index,
    add_column,
    copy_rows,
    upsert,
    trigger,
    transaction,
]
