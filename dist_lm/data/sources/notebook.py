"""Jupyter notebooks as source texts: code as it is, text as comments, in the percent format of jupytext.

    # %% [markdown]
    # # Title

    # %%
    x = 1

Outputs, and images inside of texts, are left out. Formats 3 and 4 of nbformat are read.
"""

import json
import re
from typing import Any

from dist_lm.errors import UserError

SUFFIX = ".ipynb"
DEFAULT = "python"  # language of a notebook that names none
COMMENTS = {
    prefix: languages.split()
    for prefix, languages in {
        "//": "c c++ cpp c# csharp f# fsharp java javascript typescript rust go scala kotlin swift dart groovy",
        "--": "sql haskell lua",
        ";": "clojure lisp scheme racket",
        "%": "matlab prolog erlang",
    }.items()
}
IPYTHON = ("python", "ipython", "python3", "sage", "sagemath")
# Lines that IPython, not Python, reads: `%matplotlib inline`, `!pip install`, but not `% name` or `!= 1`, with which an
# expression goes on.
MAGIC = re.compile(r"^([ \t]*)(%[a-zA-Z].*|!(?!=).*)$", re.MULTILINE)
IMAGE = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")


class NotebookError(UserError):
    """Raised for content that is no notebook."""


def notebook_text(content: bytes) -> tuple[str, str]:
    """Returns the text of a notebook and the language of its code, in lower case as its kernel calls it.

    Cells without text are left out.

    Raises:
        NotebookError: it is no UTF-8, no JSON, or has no cells. A RecursionError of deep JSON passes.
    """
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise NotebookError(f"no notebook ({error})") from None
    if not isinstance(notebook, dict):
        raise NotebookError("no notebook: expected a JSON object")

    language = _language(notebook)
    comment = next((prefix for prefix, languages in COMMENTS.items() if language in languages), "#")
    parts = []
    for cell in _cells(notebook):
        source = _source(cell)
        if not source.strip():
            continue
        if cell.get("cell_type") == "code":
            parts.append(f"{comment} %%\n{_code(source, language, comment)}")
        else:
            kind = "raw" if cell.get("cell_type") == "raw" else "markdown"
            parts.append(f"{comment} %% [{kind}]\n{_commented(IMAGE.sub('data:', source), comment)}")
    return "\n\n".join(parts) + ("\n" if parts else ""), language


def _language(notebook: dict[str, Any]) -> str:
    metadata = notebook.get("metadata")
    if isinstance(metadata, dict):
        for key, name in (("language_info", "name"), ("kernelspec", "language")):
            table = metadata.get(key)
            if isinstance(table, dict) and isinstance(table.get(name), str) and table[name].strip():
                return table[name].strip().lower()
    return DEFAULT


def _cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the cells; of format 3 those of all worksheets.

    Raises:
        NotebookError: there are none.
    """
    sheets = notebook.get("worksheets") if "cells" not in notebook else [notebook]
    if not isinstance(sheets, list):
        raise NotebookError("no notebook: it has no cells")
    cells = []
    for sheet in sheets:
        cells_of_sheet = sheet.get("cells") if isinstance(sheet, dict) else None
        if not isinstance(cells_of_sheet, list) or not all(isinstance(cell, dict) for cell in cells_of_sheet):
            raise NotebookError("no notebook: its cells are no list of objects")
        cells += cells_of_sheet
    return cells


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source", cell.get("input", ""))
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        raise NotebookError("no notebook: the source of a cell is no text")
    if cell.get("cell_type") == "heading" and isinstance(cell.get("level"), int):
        source = "#" * min(6, max(1, cell["level"])) + " " + source
    return source.rstrip("\n")


def _code(source: str, language: str, comment: str) -> str:
    if language not in IPYTHON:
        return source
    # The text of a cell such as %%bash is of another language.
    if source.lstrip().startswith("%%"):
        return _commented(source, comment)
    return MAGIC.sub(rf"\1{comment} \2", source)


def _commented(text: str, comment: str) -> str:
    return "\n".join(f"{comment} {line}".rstrip() for line in text.split("\n"))
