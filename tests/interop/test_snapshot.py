"""Files beside the weights of a model of transformers."""

from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.interop.snapshot import chat_template_of


def test_a_chat_template_that_is_not_utf8_is_refused_by_its_file(tmp_path: Path) -> None:
    # An import would end in the traceback of a UnicodeDecodeError, which names no file.
    (tmp_path / "chat_template.jinja").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ArtefactError, match=r"chat_template\.jinja: byte 2 is not UTF-8"):
        chat_template_of(tmp_path)
