"""A line of JSON ends at a line feed, whatever else a text holds that looks like the end of a line."""

import json

import pytest

from dist_lm.cluster.events import Journal, read_events
from dist_lm.evaluation.bfcl_questions import _lines
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.metrics import MetricsFollower, last_metrics, read_metrics

SEPARATORS = "\u2028\u2029\u0085\x1c\x0b\x0c\r"


@pytest.fixture
def file(tmp_path):
    values = [{"step": 1, "time": 2.0, "event": "x", "text": f"a{one}b"} for one in SEPARATORS]
    path = tmp_path / "lines.jsonl"
    path.write_bytes("\n\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode() + b"\n")
    return path, values


@pytest.mark.parametrize("read", [json_lines, _lines, read_events])
def test_texts_with_other_separators_are_read_back(file, read):
    path, values = file
    assert list(read(path)) == values


def test_metrics_are_cut_at_line_feeds(file):
    path, values = file
    path.write_bytes(path.read_bytes().replace(b"\n\n", b"\n"))
    assert list(read_metrics(path)) == MetricsFollower(path).poll() == values
    assert last_metrics(path) == values[-1]


def test_what_follows_half_a_line_of_a_killed_launcher_is_an_event(tmp_path):
    run = WorkDirectory(tmp_path).run("language", "default")
    run.create()
    Journal(run).write("started", attempt=1)
    with run.events.open("a") as file:
        file.write('{"time": 1, "ev')
    Journal(run).write("finished", steps=7)
    Journal(run).write("stopped", signal="TERM")
    assert [event["event"] for event in read_events(run.events)] == ["started", "finished", "stopped"]
