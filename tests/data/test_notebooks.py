"""Notebooks are texts of code and comments; what is none is counted, whatever it does to a parser."""

import ast
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.screening import SourceReader
from dist_lm.data.sources.notebook import notebook_text
from dist_lm.data.sources.reader import Rejected

CELLS: list[dict[str, Any]] = [
    {"cell_type": "markdown", "source": ["# Title\n", "\n", "text ![plot](data:image/png;base64,iVBORw0KGgo=)"]},
    {"cell_type": "code", "source": "%matplotlib inline\nx = 1\nif x:\n    !ls\n    y = x % 2", "outputs": ["SECRET"]},
    {"cell_type": "code", "source": ["%%bash\n", "ls -l\n"]},
    {"cell_type": "code", "source": "\n"},
    {"cell_type": "raw", "source": "raw"},
]
TEXT = """\
# %% [markdown]
# # Title
#
# text ![plot](data:)

# %%
# %matplotlib inline
x = 1
if x:
    # !ls
    y = x % 2

# %%
# %%bash
# ls -l

# %% [raw]
# raw
"""


def notebook(cells: list[dict[str, Any]] = CELLS, language: str | None = "python", **metadata: object) -> bytes:
    if language:
        metadata["language_info"] = {"name": language}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}).encode()


def read(path: Path, **keys: object) -> list[Any]:
    return list(SourceReader(0).read(SourceConfig(**{"reader": "files", "path": str(path), **keys})))


def test_an_operator_at_the_beginning_of_a_line_is_no_magic():
    """An expression may go on with `%` or `!=`: as a comment, it left code that no parser takes."""
    source = "text = ('%s'\n        % name)\n\n\nok = (1\n      != 2)\n%time run()\n  !ls -l\nx = (7\n%2)"
    text, _ = notebook_text(notebook([{"cell_type": "code", "source": source}]))
    assert text == "# %%\n" + source.replace("%time", "# %time").replace("!ls", "# !ls") + "\n"
    ast.parse(text)


@pytest.mark.parametrize("suffix", [".ipynb", ".ipynb.xz"])
def test_cells_are_code_and_comments(tmp_path, suffix):
    content = notebook()
    (tmp_path / f"a{suffix}").write_bytes(lzma.compress(content) if suffix.endswith("xz") else content)
    (document,) = read(tmp_path)
    assert (document.text, document.language) == (TEXT, "python")
    ast.parse(document.text)


@pytest.mark.parametrize(
    ("language", "expected", "comment"),
    [("R", "r", "#"), ("ir", "text", "#"), ("C++", "cpp", "//"), ("scala", "scala", "//"), (None, "python", "#")],
)
def test_the_kernel_names_the_language(tmp_path, language, expected, comment):
    (tmp_path / "a.ipynb").write_bytes(notebook([CELLS[0]], language))
    (document,) = read(tmp_path)
    assert document.language == expected
    assert document.text.startswith(f"{comment} %% [markdown]\n{comment} # Title")


def test_a_notebook_of_another_language_is_left_out_by_only(tmp_path):
    (tmp_path / "a.ipynb").write_bytes(notebook(language="R"))
    (tmp_path / "b.ipynb").write_bytes(notebook())
    other, document = read(tmp_path, only=["python"])
    assert (other.reason, document.language) == ("other_language", "python")


def test_format_3_is_read():
    cells = [
        {"cell_type": "heading", "level": 2, "source": ["Part"]},
        {"cell_type": "code", "input": ["a = 1\n", "b = 2"], "language": "python", "outputs": []},
    ]
    content = json.dumps({"nbformat": 3, "metadata": {"name": ""}, "worksheets": [{"cells": cells}]}).encode()
    assert notebook_text(content) == ("# %% [markdown]\n# ## Part\n\n# %%\na = 1\nb = 2\n", "python")


def hostile() -> dict[str, bytes]:
    return {
        "text": b"no JSON",
        "conflict": notebook().replace(b'"cells"', b'<<<<<<< HEAD\n"cells"'),
        "list": b"[]",
        "no cells": b"{}",
        "cells of numbers": b'{"cells": [1, 2]}',
        "source of numbers": b'{"cells": [{"cell_type": "code", "source": 5}]}',
        "worksheets of numbers": b'{"worksheets": [3]}',
        "lone surrogate": b'{"cells": [{"cell_type": "code", "source": "\\ud800"}]}',
        "deep": b'{"cells": ' + b"[" * 1_000_000,
        "cut": notebook()[:-20],
        "a list of lists": b'{"cells": [' + b"[]," * 12_000_000 + b"[]]}",
    }


@pytest.mark.parametrize("name", hostile())
def test_what_is_no_notebook_is_counted(tmp_path, name):
    (tmp_path / "a.ipynb").write_bytes(hostile()[name])
    (tmp_path / "b.ipynb").write_bytes(notebook())
    broken, document = read(tmp_path)
    assert isinstance(broken, Rejected)
    assert (broken.reason, broken.error) == ("broken_notebook", "")
    assert document.text == TEXT


def test_mutated_notebooks_end_in_a_text_or_a_count(tmp_path):
    draw = random.Random(3)
    whole = notebook()
    for number in range(30):
        content = bytearray(whole)
        content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / f"{number}.ipynb").write_bytes(content)
    for candidate in read(tmp_path):
        assert not isinstance(candidate, Rejected) or candidate.reason in ("broken_notebook", "invalid_utf8", "binary")
