"""Answers in SQL that try to pass tests without solving the task."""

from tests.forgery.forgery import Forgery

READS = ("sql_query", "own_sql")
CHANGES = ("sql_writes", "sql_table", "sql_copy")
ALL = (*READS, *CHANGES)

SQL = [
    Forgery(
        "temporary_table",
        "a temporary table hides the one that is tested",
        "CREATE TEMP TABLE orders AS SELECT 1 AS id, 'Ann' AS person, 6 AS amount UNION ALL SELECT 2, 'Bo', 4",
        ("sql_writes",),
    ),
    Forgery(
        "temporary_view",
        "a temporary view hides the tested table",
        "CREATE TEMP VIEW orders AS SELECT 1 AS id, 'Ann' AS person, 6 AS amount UNION ALL SELECT 2, 'Bo', 4",
        ("sql_writes",),
    ),
    Forgery(
        "temporary_result",
        "temporary tables hide what the answer is compared with",
        "CREATE TEMP TABLE orders (id, person, amount); INSERT INTO temp.orders VALUES (1, 'x', 1);\n"
        "CREATE TABLE sums AS SELECT person, amount AS total FROM temp.orders",
        ("sql_table",),
    ),
    Forgery(
        "emptied_table",
        "what the answer is compared with is changed instead",
        "DELETE FROM orders; INSERT INTO orders VALUES (1, 'x', 1); CREATE TABLE sums AS SELECT 'x' AS p, 1 AS total",
        ("sql_table",),
    ),
    Forgery(
        "replaced_table",
        "the table is dropped and made again",
        "DROP TABLE orders; CREATE TABLE orders AS SELECT 1 AS id, 'x' AS person, 1 AS amount;\n"
        "CREATE TABLE sums AS SELECT 1 AS total",
        ("sql_table",),
    ),
    Forgery(
        "renamed_table",
        "another table takes the name",
        "ALTER TABLE orders RENAME TO old; CREATE VIEW orders AS SELECT 1 AS id, 'x' AS person, 1 AS amount;\n"
        "CREATE TABLE sums AS SELECT 1 AS total",
        ("sql_table",),
    ),
    Forgery(
        "changed_rows",
        "rows are changed so that a simple query prints the result",
        "DELETE FROM people WHERE city IS NOT NULL; SELECT name FROM people ORDER BY name",
        READS,
    ),
    Forgery(
        "changed_rows_and_back",
        "rows are changed under a transaction that ends before anyone looks",
        "BEGIN; DELETE FROM people WHERE city IS NOT NULL; SELECT name FROM people ORDER BY name; ROLLBACK; SELECT 1",
        READS,
    ),
    Forgery(
        "changed_rows_in_a_savepoint",
        "rows are changed inside a savepoint, and the rows are printed before it is undone",
        "SAVEPOINT s; DELETE FROM people WHERE city IS NOT NULL; SELECT name FROM people; ROLLBACK TO s; SELECT 2",
        READS,
    ),
    Forgery(
        "attached",
        "another database has a table of the name",
        "ATTACH ':memory:' AS other; CREATE TABLE other.sums AS SELECT 8 AS total UNION SELECT 0;\n"
        "CREATE TABLE other.orders AS SELECT 1 AS amount",
        CHANGES,
    ),
    Forgery(
        "both_emptied",
        "the table that the answer is compared with is emptied, too",
        "DELETE FROM orders",
        ("sql_copy", "sql_table"),
    ),
    Forgery(
        "compared_table_replaced",
        "the table that the answer is compared with becomes a view of the answer",
        "DROP TABLE orders; CREATE VIEW orders AS SELECT * FROM archive",
        ("sql_copy",),
    ),
    Forgery("attached_file", "a file is attached", "ATTACH '/tmp/x.db' AS other; SELECT name FROM other.people", ALL),
    Forgery("vacuum_into", "the database is written to a file", "VACUUM INTO '/tmp/x.db'; SELECT 1", ALL),
    Forgery(
        "writable_schema",
        "the schema is written",
        "PRAGMA writable_schema = ON;\n"
        "UPDATE sqlite_master SET sql = 'CREATE TABLE orders (id INTEGER PRIMARY KEY, person TEXT, amount INTEGER "
        "DEFAULT 6)', name = 'orders', rootpage = rootpage WHERE 1;\nPRAGMA writable_schema = RESET",
        ALL,
    ),
    Forgery(
        "schema_broken",
        "the schema cannot be read any more",
        "PRAGMA writable_schema = ON; DELETE FROM sqlite_master; PRAGMA schema_version = 99",
        ALL,
    ),
    Forgery(
        "pragmas",
        "settings change what queries say",
        "PRAGMA case_sensitive_like = ON; PRAGMA reverse_unordered_selects = ON; PRAGMA encoding = 'UTF-16';\n"
        "PRAGMA count_changes = ON; PRAGMA empty_result_callbacks = ON; PRAGMA query_only = ON; PRAGMA page_size = 512",
        ALL,
    ),
    Forgery(
        "trigger",
        "a trigger changes tables when they are tested",
        "CREATE TRIGGER t AFTER INSERT ON orders BEGIN UPDATE orders SET amount = 6; END",
        CHANGES,
    ),
    Forgery(
        "temporary_trigger",
        "a temporary trigger",
        "CREATE TEMP TRIGGER t AFTER UPDATE ON orders BEGIN DELETE FROM orders; END; UPDATE orders SET amount = amount",
        CHANGES,
    ),
    Forgery(
        "view_without_end",
        "a view that never ends is tested",
        "CREATE VIEW sums AS WITH RECURSIVE c(total) AS (SELECT 1 UNION ALL SELECT total + 1 FROM c) SELECT * FROM c",
        ("sql_table",),
    ),
    Forgery(
        "query_without_end",
        "a query that never ends",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c",
        ALL,
    ),
    Forgery(
        "large_value",
        "a value larger than memory",
        "SELECT hex(zeroblob(900000000))",
        ALL,
    ),
    Forgery(
        "many_rows",
        "rows without end",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n FROM c) SELECT * FROM c",
        ALL,
    ),
    Forgery("extension", "a library is loaded", "SELECT load_extension('/tmp/x.so')", ALL),
    Forgery(
        "file_functions",
        "files are read and written",
        "SELECT writefile('/tmp/x', 'x'); SELECT readfile('/proc/1/mem')",
        ALL,
    ),
    Forgery("fts", "a virtual table of another module", "CREATE VIRTUAL TABLE sums USING fts5(total); SELECT 1", ALL),
    Forgery("all_rows", "every row is printed", "SELECT name FROM people", READS),
    # Two names would be the right rows of one hidden database of own_sql: 18 of 10,000 have just these.
    Forgery("guessed", "rows are guessed", "SELECT 'Ann' UNION SELECT 'Bo'", READS[:1]),
    Forgery("three_guessed", "more rows are guessed", "SELECT 'Ann' UNION SELECT 'Bo' UNION SELECT 'Cy'", READS),
    Forgery(
        "mark_searched",
        "the schema and the settings are printed",
        "SELECT sql FROM sqlite_master; PRAGMA database_list",
        ALL,
    ),
    Forgery("nothing", "no statement", "-- done", ALL),
    Forgery("open_text", "the answer swallows what follows", "SELECT 1 /*", ALL),
    Forgery("open_transaction", "a transaction that never ends", "BEGIN EXCLUSIVE; SELECT 1", ALL),
]  # fmt: skip
