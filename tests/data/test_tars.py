"""Webdataset tars of others: samples, the member that is the text, and tars that are cut."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.data.sources.tars import read_tars
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError

SAMPLES = [
    {"txt": f"text {i}".encode(), "json": json.dumps({"text": f"json {i}", "license": "MIT"}).encode(), "jpg": b"\xff"}
    for i in range(5)
]


def write_tar(path: Path, samples: list[dict[str, bytes]] = SAMPLES, folder: str = "part") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number, sample in enumerate(samples):
            for extension, value in sample.items():
                member = tarfile.TarInfo(f"{folder}/{number:04d}.{extension}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    path.write_bytes(gzip.compress(content.getvalue()) if path.suffix in (".gz", ".tgz") else content.getvalue())
    return content.getvalue()


def read(path: Path, **keys) -> list[Candidate]:
    return list(read_tars(SourceConfig("tars", "x", path=str(path), **keys), 0))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_a_member_or_a_key_of_json_is_the_text(tmp_path, name):
    write_tar(tmp_path / name)
    found = read(tmp_path)
    assert [one.text for one in found if isinstance(one, Document)] == [f"text {i}" for i in range(5)]
    assert found[3].source == f"{tmp_path / name}:part/0003"
    found = read(tmp_path, column="text", licence_column="license")
    assert [(one.text, one.licence) for one in found if isinstance(one, Document)] == [
        (f"json {i}", "MIT") for i in range(5)
    ]


def test_a_member_that_no_sample_has_is_refused_with_those_that_are_there(tmp_path):
    write_tar(tmp_path / "a.tar", [{"cls": b"1", "py.txt": b"x"}] * 3)
    with pytest.raises(ConfigError, match=r"column=txt: none of the first 3 rows .* there are cls, py.txt"):
        read(tmp_path)
    assert [one.text for one in read(tmp_path, column="py.txt") if isinstance(one, Document)] == ["x"] * 3


@pytest.mark.parametrize("size", [512 * 2, 512 * 3 - 100, 512 * 3, 512 * 5 + 30])
def test_a_tar_that_is_cut_anywhere_is_an_error(tmp_path, size):
    content = write_tar(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content[:size])
    with pytest.raises(ArtefactError, match=r"a.tar: .*truncated") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_tars_that_were_joined_are_refused_not_half_read(tmp_path):
    content = write_tar(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content + content)
    with pytest.raises(ArtefactError, match="goes on after its end mark"):
        read(tmp_path)


def test_a_broken_sample_is_counted(tmp_path):
    write_tar(tmp_path / "a.tar", [SAMPLES[0], {"txt": b"caf\xe9"}, {"json": b"{"}, {"jpg": b"x"}])
    found = read(tmp_path)
    assert [(one.source.rpartition("/")[2], one.reason) for one in found if isinstance(one, Rejected)] == [
        ("0001", "invalid_utf8"),
        ("0002", "broken_json"),
        ("0003", "missing_column"),
    ]


def test_a_name_that_is_not_utf8_can_be_written(tmp_path):
    """To manifest.json, in the list of what was dropped."""
    write_tar(tmp_path / "a.tar", [SAMPLES[0], {"txt": b"caf\xe9"}], folder="caf\udce9")
    good, bad = read(tmp_path)
    assert good.source == f"{tmp_path}/a.tar:caf\\udce9/0000"
    assert bad.source == f"{tmp_path}/a.tar:caf\\udce9/0001"
