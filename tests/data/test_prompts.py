"""Prompts from files and addresses: numbered, and one that cannot be read does not move the others."""

import functools
import http.server
import json
import threading

import pytest

from dist_lm.data.prompts import find_prompts, read_prompts, survey
from dist_lm.errors import ArtefactError, ConfigError


def test_lines_are_numbered_over_files_and_broken_ones_say_why(tmp_path):
    lines = [
        json.dumps({"prompt": "a\nb", "id": "first"}),
        "",
        json.dumps({"prompt": "c"}),
        "{",
        json.dumps({"prompt": 3, "id": "x"}),
        json.dumps({"prompt": "\ud800", "id": 7}),
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    (tmp_path / "b.txt").write_bytes("  d \r\n\r\né".encode())
    files = find_prompts(str(tmp_path / "*"))
    found = list(read_prompts(files))
    assert [prompt.number for prompt in found] == list(range(8))
    assert [(p.id, p.text) for p in found if not p.error] == [("first", "a\nb"), ("1", "c"), ("6", "  d "), ("7", "é")]
    errors = [prompt.error for prompt in found if prompt.error]
    words = ("line 4: not JSON", "line 5: expected an object with a text `prompt`", "lone surrogate", "not UTF-8")
    assert all(word in error for word, error in zip(words, errors, strict=True))
    assert survey(files)["prompts"] == 8


@pytest.mark.parametrize(
    ("where", "words"),
    [("", "no such file"), ("nowhere/*.txt", r"nowhere/\*\.txt: no such file"), ("pyproject.toml", "neither .jsonl")],
)
def test_what_is_no_file_of_prompts_is_refused(where, words):
    with pytest.raises(ConfigError, match=f"^stage.prompts=.*{words}"):
        find_prompts(where)


def test_an_address_is_fetched_once(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "p.txt").write_text("one\ntwo\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        kept = find_prompts(f"{where}/p.txt", tmp_path / "kept")
        with pytest.raises(ArtefactError, match=r"q\.txt: cannot be fetched \(File not found|Not Found"):
            find_prompts(f"{where}/q.txt", tmp_path / "kept")
        server.shutdown()
    assert find_prompts(f"{where}/p.txt", tmp_path / "kept") == kept
    assert [prompt.text for prompt in read_prompts(kept)] == ["one", "two"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["p.txt"]
