"""Statements that select rows of a schema: filters, joins, subqueries, sets, text functions, views.

Each function returns `(description, SQL)`, or None if the schema has no table or column for it. The SQL has no
semicolon. With a decorator a function takes the scene alone; the decorator draws its table and column, or its two
related tables.
"""

from dist_lm.demo.sql_analyses import by_period, group_by_value, totals_of_children
from dist_lm.demo.sql_scene import Clause, Scene, Statement, Write, about_column, about_relation, spoken
from dist_lm.demo.sql_schema import TEXTS, Column, Table, singular


def plain(scene: Scene) -> Statement:
    """Returns description and SQL of a statement that selects the rows of one table that meet one to three conditions.

    The conditions are joined by AND. The statement selects all columns, the key and some others, or some; it always
    orders the rows by a column, and every second one on average has a LIMIT. The description says only which table and
    which conditions.
    """
    table = scene.rng.choice(scene.tables)
    conditions = [scene.predicate(table) for _ in range(scene.rng.randint(1, 3))]
    order = scene.rng.choice(table.columns).name

    clauses: list[Clause] = [
        ("SELECT", scene.rng.choice([["*"], [table.key, *scene.some(table, 4)], scene.some(table, 4)]), ", "),
        ("FROM", [table.name], ""),
        ("WHERE", [condition for condition, _ in conditions], " AND "),
        ("ORDER BY", [order + scene.rng.choice(["", " DESC", " ASC"])], ", "),
    ]

    if scene.rng.random() < 0.5:
        clauses.append(("LIMIT", [str(scene.rng.choice([5, 10, 20, 50, 100]))], ""))
    return f"{spoken(table.name)} {' and '.join(words for _, words in conditions)}", scene.style.render(clauses)


@about_column({"city", "country", "choice", "word", "unit"})
def distinct_values(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that lists the distinct values of a column."""
    clauses: list[Clause] = [
        ("SELECT DISTINCT", [column.name], ", "),
        ("FROM", [table.name], ""),
        ("ORDER BY", [scene.rng.choice([column.name, f"LENGTH({column.name})", "1"])], ", "),
    ]
    return f"every {spoken(column.name)} among the {spoken(table.name)}", scene.style.render(clauses)


@about_relation
def join_two(scene: Scene, child: Table, key: str, parent: Table) -> Statement:
    """Returns description and SQL of a statement that joins a child table with its parent."""
    c, p = scene.alias(child), scene.alias(parent)
    condition, words = scene.predicate(child, f"{c}.")

    clauses: list[Clause] = [
        ("SELECT", [*scene.some(parent, 2, f"{p}."), *scene.some(child, 3, f"{c}.")], ", "),
        ("FROM", [scene.named(child)], ""),
        (
            scene.rng.choice(["JOIN", "INNER JOIN"]),
            [f"{scene.named(parent)} ON {p}.{parent.key} = {c}.{key}"],
            "",
        ),
        ("WHERE", [condition], ""),
    ]
    return f"{spoken(child.name)} {words}, each with its {spoken(singular(parent.name))}", scene.style.render(clauses)


def join_three(scene: Scene) -> Statement | None:
    """Returns description and SQL of a statement that counts grandchildren with two left joins. None if no three tables
    are related in a row."""
    chains = [
        (a, key_a, scene.table(b), key_b, scene.table(c))
        for a in scene.tables
        for key_a, b in a.parents
        for key_b, c in scene.table(b).parents
        if len({a.name, b, c}) == 3
    ]

    # Most schemas have no three tables in a row.
    if not chains:
        return None

    low, low_key, middle, middle_key, top = scene.rng.choice(chains)
    a, b, c = scene.alias(low), scene.alias(middle), scene.alias(top)
    label = scene.rng.choice(top.columns).name

    clauses: list[Clause] = [
        ("SELECT", [f"{c}.{label}", f"COUNT({a}.{low.key}) AS {low.name}_count"], ", "),
        ("FROM", [scene.named(top)], ""),
        ("LEFT JOIN", [f"{scene.named(middle)} ON {b}.{middle_key} = {c}.{top.key}"], ""),
        ("LEFT JOIN", [f"{scene.named(low)} ON {a}.{low_key} = {b}.{middle.key}"], ""),
        ("GROUP BY", [f"{c}.{top.key}", f"{c}.{label}"], ", "),
        ("ORDER BY", [f"{low.name}_count DESC", f"{c}.{label}"], ", "),
    ]
    return f"{spoken(low.name)} for every {spoken(singular(top.name))}", scene.style.render(clauses)


@about_relation
def without_children(scene: Scene, child: Table, key: str, parent: Table) -> Statement:
    """Returns description and SQL of a statement that selects parents without children, by LEFT JOIN or NOT EXISTS."""
    words = f"{spoken(parent.name)} without {spoken(child.name)}"

    c, p = scene.alias(child), scene.alias(parent)
    columns = scene.some(parent, 3, f"{p}.")
    head: list[Clause] = [("SELECT", columns, ", "), ("FROM", [scene.named(parent)], "")]

    # Both ways find the same rows: a join that fails, or a subquery without a row.
    if scene.rng.random() < 0.5:
        join = f"{scene.named(child)} ON {c}.{key} = {p}.{parent.key}"
        return words, scene.style.render(
            [*head, ("LEFT JOIN", [join], ""), ("WHERE", [f"{c}.{child.key} IS NULL"], "")]
        )

    inner: list[Clause] = [
        ("SELECT", ["1"], ""),
        ("FROM", [scene.named(child)], ""),
        ("WHERE", [f"{c}.{key} = {p}.{parent.key}"], ""),
    ]
    return words, scene.style.render([*head, ("WHERE", [f"NOT EXISTS {scene.style.block(inner)}"], "")])


@about_relation
def with_matching_children(scene: Scene, child: Table, key: str, parent: Table) -> Statement:
    """Returns description and SQL of a statement that selects parents with children that meet a condition."""
    condition, words = scene.predicate(child)
    inner: list[Clause] = [("SELECT", [key], ""), ("FROM", [child.name], ""), ("WHERE", [condition], "")]

    clauses: list[Clause] = [
        ("SELECT", scene.some(parent, 4), ", "),
        ("FROM", [parent.name], ""),
        ("WHERE", [f"{parent.key} IN {scene.style.block(inner)}"], ""),
    ]
    return f"{spoken(parent.name)} that have {spoken(child.name)} {words}", scene.style.render(clauses)


def both_sets(scene: Scene) -> Statement | None:
    """Returns description and SQL of a statement that combines the values of two columns with a set operation. None if
    there is no column of text, or the two drawn are one."""
    columns = scene.columns(TEXTS)
    if not columns:
        return None

    # A set operation of a column with itself says nothing.
    first, second = scene.rng.choice(columns), scene.rng.choice(columns)
    if first == second:
        return None

    operator, words = scene.rng.choice(
        [("UNION", "or"), ("UNION ALL", "or"), ("INTERSECT", "and"), ("EXCEPT", "but not")]
    )

    parts = []
    for table, column in (first, second):
        parts.append(scene.style.flat([("SELECT", [column.name], ", "), ("FROM", [table.name], "")]))

    set_operation = f"\n{operator}\n".join(parts)
    return f"{spoken(first[1].name)} of {spoken(first[0].name)} {words} of {spoken(second[0].name)}", set_operation


@about_column(TEXTS)
def text_functions(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that applies a text function to a column."""
    name = column.name
    expression, words = scene.rng.choice(
        [
            (f"UPPER({name})", "in capitals"),
            (f"LENGTH(TRIM({name}))", "as its length"),
            (f"SUBSTR({name}, 1, {scene.rng.randint(2, 8)})", "cut short"),
            (f"COALESCE({name}, 'unknown')", "or unknown"),
            (f"'#' || {table.key} || ' ' || {name}", "with its number"),
            (f"REPLACE(LOWER({name}), ' ', '-')", "as a slug"),
        ]
    )

    alias = scene.rng.choice(["label", "display", "shown", f"{name}_text"])
    clauses: list[Clause] = [
        ("SELECT", [table.key, f"{expression} AS {alias}"], ", "),
        ("FROM", [table.name], ""),
    ]

    if scene.rng.random() < 0.5:
        clauses.append(("WHERE", [scene.predicate(table)[0]], ""))

    return f"{spoken(name)} of {spoken(table.name)} {words}", scene.style.render(clauses)


def view(scene: Scene) -> Statement | None:
    """Returns description and SQL of a statement that creates a view of another statement. None if that statement needs
    what the schema lacks."""
    inner = scene.rng.choice([join_two, totals_of_children, group_by_value, by_period])(scene)
    if inner is None:
        return None
    words, text = inner

    kind = scene.rng.choice(["overview", "summary", "report", "listing"])
    name = f"{scene.rng.choice(scene.tables).name}_{kind}_{scene.rng.randint(1, 99)}"
    return words, f"CREATE VIEW {name} AS\n{text}"


QUERIES: list[Write] = [
    plain,
    plain,
    distinct_values,
    join_two,
    join_three,
    without_children,
    with_matching_children,
    both_sets,
    text_functions,
    view,
]
