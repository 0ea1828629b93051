"""Samples become a table: every key a column, every sample a row, within bounds."""

from dist_lm.tracking.sample_table import CHARACTERS, ROWS, table_name, table_of


def test_rows_have_the_columns_of_all() -> None:
    columns, rows = table_of([{"prompt": "a", "right": True}, {"prompt": "b", "parts": {"x": 1}}])
    assert columns == ["prompt", "right", "parts"]
    assert rows == [["a", True, None], ["b", None, '{"x": 1}']]


def test_size_is_bounded_and_urls_lose_their_passwords() -> None:
    columns, rows = table_of({"text": "x" * 2 * CHARACTERS} for _ in range(2 * ROWS))
    assert (columns, len(rows)) == (["text"], ROWS)
    assert len(rows[0][0]) < CHARACTERS + 50
    assert table_of([{"text": "https://me:sesame@host/"}])[1] == [["https://***@host/"]]
    assert table_of([]) == ([], [])


def test_every_stage_has_a_name_for_them() -> None:
    assert [table_name(stage) for stage in ("tools", "rlhf", "code")] == [
        "samples/tool_calls",
        "samples/rollouts",
        "samples/generations",
    ]
