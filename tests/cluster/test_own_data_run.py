"""A lab's own data, from five kinds of files to a mixed run, with a package that nobody may write to."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dist_lm.data.manifest import read_manifest
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
CONF = {
    "corpus/ours.yaml": """
corpora:
  code:
    - {reader: files, path: DATA/repo, licence: MIT}
    - {reader: jsonl, path: DATA/snippets.jsonl.zst, column: content, language_column: lang}
    - {reader: parquet, path: s3://texts/notes, column: body, language: english, licence: CC0-1.0}
    - {reader: tars, path: DATA/foreign, language: bash}
  tools:
    - {reader: messages, path: DATA/chat.jsonl.gz, language: support}
val_fraction: 0.1
""",
    "stage/ours.yaml": """
defaults: [tools, _self_]
init_from: none
mix: {code: 0.7, language: 0}
seq_len: 448
global_batch: 4
steps: 6
warmup_steps: 2
questions: {per_kind: 1}
""",
}
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "river",
    "bridge",
    "engine",
    "window",
    "letter",
    "number",
    "answer",
    "question",
    "morning",
    "signal",
    "copper",
]


def lines(place: int, count: int = 12) -> list[str]:
    """Sentences that no other place has."""
    return [" ".join(WORDS[(place * 7 + line * word) % len(WORDS)] for word in range(1, 9)) + f" {place} {line}"
            for line in range(count)]  # fmt: skip


def python(place: int) -> str:
    return "".join(f"def f{place}_{n}():\n    return '{line}'\n\n\n" for n, line in enumerate(lines(place)))


def conversation(place: int) -> dict:
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": json.dumps({"n": place})}}
    return {
        "messages": [
            {"role": "user", "content": f"Find number {place}: {lines(place, 1)[0]}"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": f"{place * 3}"},
            {"role": "assistant", "content": f"It is {place * 3}."},
        ],
        "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {
            "n": {"type": "integer"}}, "required": ["n"]}}}],
    }  # fmt: skip


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """The lab's folder: `data/` and `conf/`."""
    data = tmp_path / "data"
    (data / "repo" / "src").mkdir(parents=True)
    (data / "foreign").mkdir()
    for place in range(40):
        (data / "repo" / "src" / f"m{place}.py").write_text(python(place))
    rows = [{"content": python(place), "lang": "Python"} for place in range(100, 160)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (data / "snippets.jsonl.zst").write_bytes(zstandard.compress(text))
    chats = "".join(json.dumps(conversation(place)) + "\n" for place in range(60)).encode()
    (data / "chat.jsonl.gz").write_bytes(gzip.compress(chats))
    with tarfile.open(data / "foreign" / "part-000.tar", "w") as tar:
        for place in range(200, 240):
            for suffix, content in (("txt", "\n".join(f"echo '{one}'" for one in lines(place))), ("cls", "7")):
                info = tarfile.TarInfo(f"sample{place}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
    for name, text in CONF.items():
        file = tmp_path / "conf" / name
        file.parent.mkdir(parents=True)
        file.write_text(text.replace("DATA", str(data)))
    return tmp_path


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a store that speaks S3, on loopback, with a bucket of parquet."""
    import boto3
    from moto.server import ThreadedMotoServer

    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket="texts")
        table = pa.table({"body": ["\n".join(lines(place)) for place in range(300, 340)], "stars": range(40)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        client.put_object(Bucket="texts", Key="notes/a.parquet", Body=buffer.getvalue())
        yield environment
    finally:
        server.stop()


def read_only(command: list[str]) -> list[str]:
    """The command in a mount namespace in which nobody can write to the package; needs root."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return ["unshare", "--mount", "bash", "-c", script, str(ROOT), *command]


@pytest.mark.bars  # tests of sources read each kind of file
@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only mount needs root")
def test_a_lab_trains_on_five_kinds_of_files_with_25_lines_of_its_own(lab, store):
    yaml = [line for text in CONF.values() for line in text.splitlines() if line.strip()]
    assert len(yaml) <= 25
    command = [sys.executable, "-m", "dist_lm.launch", "--config-dir", "conf", "stage=ours", "corpus=ours"]
    command += ["work_dir=work", "model=nano", "model.vocab_size=600", "tracking=none", "device=cpu"]
    done = subprocess.run(
        read_only(command),
        cwd=lab,
        env={**os.environ, **store, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    work = WorkDirectory(lab / "work")
    manifest = read_manifest(work.corpus("code"))
    languages = manifest.splits["train"].languages
    assert languages.keys() == {"python", "english", "bash"}
    train, val = (manifest.splits[name].counts.documents for name in ("train", "val"))
    assert train + val == 40 + 60 + 40 + 40
    chats = read_manifest(work.corpus("tools"))
    assert sum(split.counts.documents for split in chats.splits.values()) == 60
    assert (work.run("tools", "default").path / "result.json").exists()
    written = "".join(path.read_text(errors="replace") for path in work.path.rglob("*.yaml"))
    assert "testing-secret" not in written
