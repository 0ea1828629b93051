"""Real code to train a small tokenizer on: a part of the standard library, in a fixed order."""

import sysconfig
from pathlib import Path

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "encodings",
    "http",
    "importlib",
    "json",
    "logging",
)
SHELL = '#!/bin/bash\nset -e\nif [[ "$a" == "$b" ]] && [ -f "$1" ]; then\n\techo "same" >> out\nfi\n'


def stdlib_texts() -> list[str]:
    """About 2 MB of Python, and a little shell."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return [path.read_text(encoding="utf-8") for path in files] + [SHELL]
