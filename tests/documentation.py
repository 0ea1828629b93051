"""What tests take out of the pages in docs/."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def block(page: str, language: str, word: str) -> str:
    """The first block of code of a page that holds `word`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return next(text for text in found if word in text)


def run(page: str, word: str) -> dict[str, Any]:
    """Run such a block of Python as a program; its names afterwards."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block(page, "python", word), page, "exec"), names)
    return names
