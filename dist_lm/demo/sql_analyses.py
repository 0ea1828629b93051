"""Statements that count and measure the rows of a schema: groups, windows, table expressions, bands, periods.

Each function returns `(description, SQL)`, or None if the schema has no table or column for it. The SQL has no
semicolon. With a decorator a function takes the scene alone; the decorator draws its table and column, or its two
related tables.
"""

# ruff: noqa: S608  (this SQL is text to learn from: nothing in it comes from a user)

from dist_lm.demo.sql_scene import Clause, Scene, Statement, Write, about_column, about_relation, spoken
from dist_lm.demo.sql_schema import DATES, QUANTITIES, Column, Table, singular

AGGREGATES = [("SUM", "total"), ("AVG", "average"), ("MIN", "lowest"), ("MAX", "highest")]


@about_column({"city", "country", "choice", "flag"})
def group_by_value(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that counts rows by the value of a column."""
    columns = [
        column.name,
        f"COUNT(*) AS {scene.rng.choice(['n', 'total', 'how_many', table.name + '_count'])}",
    ]
    words = f"number of {spoken(table.name)} by {spoken(column.name)}"

    numbers = table.of(QUANTITIES)
    if numbers:
        function, _ = scene.rng.choice(AGGREGATES)
        measured = scene.rng.choice(numbers).name
        columns.append(f"ROUND({function}({measured}), 2) AS {function.lower()}_{measured}")

    clauses: list[Clause] = [("SELECT", columns, ", "), ("FROM", [table.name], "")]
    if scene.rng.random() < 0.4:
        condition, spoken_condition = scene.predicate(table)
        clauses.append(("WHERE", [condition], ""))
        words += f", {spoken_condition}"

    clauses.append(("GROUP BY", [column.name], ", "))
    if scene.rng.random() < 0.5:
        clauses.append(("HAVING", [f"COUNT(*) {scene.rng.choice(['>', '>='])} {scene.rng.randint(1, 5)}"], ""))
    clauses.append(("ORDER BY", [scene.rng.choice(["2 DESC", column.name, "COUNT(*) DESC"])], ", "))

    return words, scene.style.render(clauses)


@about_relation
def totals_of_children(scene: Scene, child: Table, key: str, parent: Table) -> Statement | None:
    """Returns description and SQL of a statement that aggregates a quantity of child rows for each parent. None if the
    child has no quantity."""
    if not child.of(QUANTITIES):
        return None

    c, p = scene.alias(child), scene.alias(parent)
    measured = scene.rng.choice(child.of(QUANTITIES)).name
    function, words = scene.rng.choice(AGGREGATES)
    label = scene.rng.choice(parent.columns).name
    name = f"{words}_{measured}"

    clauses: list[Clause] = [
        ("SELECT", [f"{p}.{label}", f"{function}({c}.{measured}) AS {name}"], ", "),
        ("FROM", [scene.named(parent)], ""),
        ("JOIN", [f"{scene.named(child)} ON {c}.{key} = {p}.{parent.key}"], ""),
        ("GROUP BY", [f"{p}.{parent.key}"], ", "),
        ("HAVING", [f"COUNT(*) > {scene.rng.randint(1, 4)}"], ""),
        ("ORDER BY", [f"{name} DESC"], ", "),
    ]
    return f"{words} {spoken(measured)} of the {spoken(child.name)} by {spoken(label)}", scene.style.render(clauses)


@about_column(QUANTITIES)
def above_average(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that selects the rows above the average of a column, or at its
    maximum."""
    # An extreme value is above no other, so only averages are compared with `>`.
    function, words = scene.rng.choice(AGGREGATES[1:2] + AGGREGATES[3:])
    operator, relation = "=", "at the"
    if function == "AVG":
        operator, relation = ">", "above the"

    inner: list[Clause] = [("SELECT", [f"{function}({column.name})"], ""), ("FROM", [table.name], "")]
    clauses: list[Clause] = [
        ("SELECT", [table.key, *scene.some(table, 3)], ", "),
        ("FROM", [table.name], ""),
        ("WHERE", [f"{column.name} {operator} {scene.style.block(inner)}"], ""),
    ]

    return f"{spoken(table.name)} {relation} {words} {spoken(column.name)}", scene.style.render(clauses)


@about_relation
def with_expression(scene: Scene, child: Table, key: str, parent: Table) -> Statement | None:
    """Returns description and SQL of a statement that joins a table with a table expression that counts its children.
    None if an alias would be ambiguous."""
    name = scene.rng.choice([f"{singular(child.name)}_counts", f"per_{singular(parent.name)}", "totals", "stats"])
    columns = [key, "COUNT(*) AS n"]
    numbers = child.of(QUANTITIES)
    if numbers:
        columns.append(f"SUM({scene.rng.choice(numbers).name}) AS amount")
    inner: list[Clause] = [("SELECT", columns, ", "), ("FROM", [child.name], ""), ("GROUP BY", [key], ", ")]

    # A name that is used twice in the statement would be ambiguous.
    p = scene.alias(parent)
    if p in (name, "n"):
        return None

    outer: list[Clause] = [
        (
            "SELECT",
            [*scene.some(parent, 2, f"{p}."), *(f"{name}.{column.split(' AS ')[1]}" for column in columns[1:])],
            ", ",
        ),
        ("FROM", [scene.named(parent)], ""),
        ("JOIN", [f"{name} ON {name}.{key} = {p}.{parent.key}"], ""),
        ("WHERE", [f"{name}.n >= {scene.rng.randint(1, 6)}"], ""),
        ("ORDER BY", [f"{name}.n DESC"], ", "),
    ]

    text = f"WITH {name} AS (\n{scene.style.indented(scene.style.render(inner))}\n)\n{scene.style.render(outer)}"
    return f"{spoken(parent.name)} by number of {spoken(child.name)}", text


@about_column(DATES)
def recursive(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that counts rows for each day of a recursive calendar."""
    # The calendar is made by recursion, since rows alone would leave out the days without any.
    year = scene.rng.randint(2016, 2024)
    days = scene.rng.choice([7, 14, 30, 31, 90])
    steps = (
        f"SELECT DATE('{year}-{scene.rng.randint(1, 12):02d}-01')\nUNION ALL\n"
        f"SELECT DATE(day, '+1 day') FROM days LIMIT {days}"
    )

    text = (
        f"WITH RECURSIVE days(day) AS (\n{scene.style.indented(steps)}\n)\n"
        f"SELECT days.day, COUNT({table.name}.{table.key}) AS n\nFROM days\n"
        f"LEFT JOIN {table.name} ON DATE({table.name}.{column.name}) = days.day\nGROUP BY days.day"
    )

    return f"{spoken(table.name)} a day for {days} days, empty days included", text


@about_column(QUANTITIES)
def window(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that ranks rows or computes running figures with a window function."""
    groups = [candidate.name for candidate in table.of({"choice", "city", "country"})] + [
        key for key, _ in table.parents
    ]
    partition = ""
    if groups:
        partition = f"PARTITION BY {scene.rng.choice(groups)} "

    # Without a date, rows follow one another by their key: later ones have larger keys.
    by_time = table.key
    if dates := table.of(DATES):
        by_time = scene.rng.choice(dates).name

    name = column.name
    best = f"({partition}ORDER BY {name} DESC)"
    later = f"{partition}ORDER BY {by_time}"
    expression, words = scene.rng.choice(
        [
            (f"ROW_NUMBER() OVER {best} AS position", "position by"),
            (f"RANK() OVER {best} AS rank_{name}", "rank by"),
            (f"SUM({name}) OVER ({later}) AS running_{name}", "running"),
            (f"{name} - LAG({name}) OVER ({later}) AS change", "change of"),
            (f"AVG({name}) OVER ({later} ROWS BETWEEN 2 PRECEDING AND CURRENT ROW) AS smoothed", "smoothed"),
        ]
    )

    # A window function is not allowed in WHERE, so a filter by position needs a subquery.
    subquery = scene.style.flat([("SELECT", [table.key, name, expression], ", "), ("FROM", [table.name], "")])
    if scene.rng.random() < 0.3 and " AS position" in expression:
        top = scene.rng.randint(1, 5)
        return (
            f"the first {top} {spoken(table.name)} by {spoken(name)}",
            f"SELECT *\nFROM ({subquery})\nWHERE position <= {top}",
        )

    clauses: list[Clause] = [
        ("SELECT", [table.key, *scene.some(table, 2), expression], ", "),
        ("FROM", [table.name], ""),
    ]
    return f"{spoken(table.name)} with {words} {spoken(name)}", scene.style.render(clauses)


@about_column(QUANTITIES)
def buckets(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that sorts the values of a column into three bands with CASE."""
    # Columns without bounds are ratios, from 0 to 1, or measures.
    default_high = 1 if column.kind == "ratio" else 400
    low, high = map(float, column.arguments or (0, default_high))
    limits = [f"{low + (high - low) * share:.{0 if high > 10 else 2}f}" for share in (0.33, 0.66)]

    names = scene.rng.choice(
        [
            ("low", "medium", "high"),
            ("small", "regular", "large"),
            ("cheap", "fair", "steep"),
            ("C", "B", "A"),
        ]
    )

    label = scene.rng.choice(["bucket", "band", "category_label", "size_class"])
    i = scene.style.indent
    case = (
        f"CASE\n{i}WHEN {column.name} < {limits[0]} THEN '{names[0]}'\n"
        f"{i}WHEN {column.name} < {limits[1]} THEN '{names[1]}'\n{i}ELSE '{names[2]}'\nEND AS {label}"
    )

    # An author who writes statements on one line breaks no expression either.
    if scene.style.layout == "line":
        case = " ".join(case.split())

    clauses: list[Clause] = [
        ("SELECT", [case, "COUNT(*)"], ", "),
        ("FROM", [table.name], ""),
        ("GROUP BY", [label], ", "),
    ]

    return f"{spoken(table.name)} sorted into bands of {spoken(column.name)}", scene.style.render(clauses)


@about_column(DATES)
def by_period(scene: Scene, table: Table, column: Column) -> Statement:
    """Returns description and SQL of a statement that counts rows by year, month, weekday or hour."""
    pattern, period = scene.rng.choice([("%Y", "year"), ("%Y-%m", "month"), ("%w", "weekday"), ("%H", "hour")])
    columns = [f"STRFTIME('{pattern}', {column.name}) AS {period}", "COUNT(*) AS n"]
    numbers = table.of({"money", "int", "measure"})
    if numbers:
        columns.append(f"SUM({scene.rng.choice(numbers).name}) AS total")

    clauses: list[Clause] = [
        ("SELECT", columns, ", "),
        ("FROM", [table.name], ""),
        ("WHERE", [f"{column.name} IS NOT NULL"], " AND "),
        ("GROUP BY", [period], ", "),
        ("ORDER BY", [period], ", "),
    ]

    return f"{spoken(table.name)} by {period} of {spoken(column.name)}", scene.style.render(clauses)


ANALYSES: list[Write] = [
    group_by_value,
    totals_of_children,
    above_average,
    with_expression,
    recursive,
    window,
    window,
    buckets,
    by_period,
]
