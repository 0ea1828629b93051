"""What checks found, as a file and as the table of docs/gpu.md."""

from dataclasses import replace
from pathlib import Path

import pytest

import dist_lm
from dist_lm.errors import ArtefactError
from dist_lm.gpu_check.checks import CHECKS, WITHIN_S
from dist_lm.gpu_check.results import BEGIN, END, NOTHING, Result, Results, read_results, rewrite, table

PAGE = Path(dist_lm.__file__).parents[1] / "docs" / "gpu.md"
CARD = {"device": "NVIDIA H100 80GB HBM3", "gpus": 1, "torch": "2.13.0+cu130", "cuda": "13.0", "rehearsal": False}
FACTS = {"compiled 4x4096 tokens/s": 31240.0, "compiled 4x4096 MFU %": 41.2, "pause s": 0.0312}
FOUND = Results(
    CARD,
    {
        "large": Result("passed", 81.0, "2026-12-01", facts=FACTS),
        "masks": Result("failed", 3.0, "2026-12-01", "error | of output", {"causal, output error": 0.5}),
    },
)


def test_checks_of_one_card_take_ten_minutes_at_most():
    assert sum(check.budget_s for check in CHECKS if not check.several) <= WITHIN_S


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "results.json"
    assert read_results(path) is None
    FOUND.write(path)
    assert read_results(path) == FOUND
    path.write_text('{"checks": 3}')
    with pytest.raises(ArtefactError, match=r"results\.json"):
        read_results(path)


def test_the_table_says_what_ran_where_and_leaves_the_rest_empty():
    lines = table(CHECKS, FOUND).splitlines()
    assert lines[0] == "1 x NVIDIA H100 80GB HBM3, torch 2.13.0+cu130, CUDA 13.0."
    rows = {line.split("`")[1]: line for line in lines[4:]}
    assert list(rows) == [check.name for check in CHECKS]
    speed = "compiled 4x4096: 31,240 tokens/s; compiled 4x4096 MFU: 41.2 %; pause: 0.0312 s"
    assert rows["large"].endswith(f"| 2026-12-01: passed. {speed} |")
    assert r"**failed: error \| of output; before that: causal, output: 0.5 error**" in rows["masks"]
    assert rows["varlen"].endswith("| |")


def test_a_rehearsal_is_not_a_result_of_a_card():
    rehearsed = replace(FOUND, machine=CARD | {"device": "CPU", "rehearsal": True})
    assert NOTHING in table(CHECKS, rehearsed).splitlines()[0]


def test_a_table_replaces_the_one_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        rewrite(page, "new\n")
        assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no markers\n")
    with pytest.raises(ArtefactError, match=r"page\.md"):
        rewrite(page, "new\n")
    assert page.read_text() == "no markers\n"


def test_the_page_has_the_table_of_all_checks():
    """Made by `dist-lm gpu check`: names and words are those of the list, whatever has run."""
    page = PAGE.read_text()
    rows = [line.split(" | ")[:2] for line in page[page.index(BEGIN) : page.index(END)].splitlines() if "| `" in line]
    assert rows[1:] == [[f"| `{check.name}`", check.shows] for check in CHECKS]
