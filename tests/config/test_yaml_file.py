"""Files of a configuration mean what they mean to OmegaConf, whichever parser reads them."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_lm.config.root import load_yaml
from dist_lm.prepare.conf_folders import conf_directory

FAULTS = (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException)
RUNS = Path(__file__).parent / "runs_of_805e6f6"

# A tab after a colon is left out: YAML allows it, libyaml reads it, and the parser in Python refuses it.
ODD = (
    "rate: 1e-5\nother: 1e5\nlast: 1.5E+3\n",
    "day: 2026-11-30\ntime: 12:30:45\n",
    "yes: no\non: off\nnull: ~\n",
    "key: 1\nkey: 2\n",
    "a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\n",
    "a: ${b}\nb: ${oc.env:HOME}\n",
    "? [1, 2]\n: 3\n",
    "1: one\n1.5: half\ntrue: yes\n",
    "a: !!python/object/apply:os.system ['true']\n",
    "a: !!binary aGVsbG8=\n",
    "a: !!set {b, c}\n",
    "a: |\n  two\n  lines\nb: >\n  one\n  line\n",
    "- 1\n- two\n",
    "7\n",
    "text\n",
    "",
    "a: [1, 2\n",
    "\ufeffa: 1\n",
    "--- {a: 1}\n--- {b: 2}\n",
    "a: 0x1F\nb: 0o17\nc: 017\nd: 1_000\ne: .inf\nf: -.INF\ng: .nan\n",
    "a: '\u2028 \x85'\nb: \"\\u2028\"\n",
    "a: \x01\n",
    "a: " + "[" * 600 + "\n",
)


def meaning(read: Any, path: Path) -> Any:
    """Returns what a reader makes of a file, or that it refuses it."""
    try:
        return repr(OmegaConf.to_container(read(path)))
    except FAULTS:
        return "refused"


def test_every_file_of_the_package_and_of_former_runs_means_the_same() -> None:
    """Finds a number or a text that libyaml reads in another way."""
    files = [*conf_directory().rglob("*.yaml"), *RUNS.rglob("*.yaml")]
    assert len(files) > 50
    for file in files:
        assert meaning(load_yaml, file) == meaning(OmegaConf.load, file), file


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_texts_mean_the_same(tmp_path: Path, number: int) -> None:
    """Finds a tag, a date, a repeated key or a control character that one parser lets through."""
    file = tmp_path / "odd.yaml"
    file.write_text(ODD[number])
    assert meaning(load_yaml, file) == meaning(OmegaConf.load, file)


def test_damaged_files_mean_the_same_or_are_refused(tmp_path: Path) -> None:
    """Finds an exception that no caller expects, and a damage that only one parser notices as another value."""
    intact = (RUNS / sorted(path.relative_to(RUNS) for path in RUNS.rglob("*.yaml"))[0]).read_bytes()
    generator, file = random.Random(0), tmp_path / "damaged.yaml"
    for _ in range(30):
        content = bytearray(intact)
        for _ in range(generator.randrange(1, 4)):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        file.write_bytes(content)
        assert meaning(load_yaml, file) == meaning(OmegaConf.load, file)
