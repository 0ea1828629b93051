"""Fixtures of tests of data."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.file_server import Served, serving


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A folder behind http."""
    with serving(tmp_path) as server:
        yield server
