"""Finds the split of a file by its name, by the words that `datasets` looks for (its data_files.py).

A data set of the hub lies in folders as `data/train-00000-of-00002.parquet` and `data/test-00000-of-00001.parquet`, in
folders `train/` and `test/`, or as `train.jsonl` and `test.jsonl`. Only train is read, unless a source names another
split: a benchmark's test questions must not be trained on because they lie beside its train questions.
"""

import re
from collections.abc import Callable
from pathlib import PurePosixPath

TRAIN, VALIDATION, TEST = "train", "validation", "test"
KINDS = {  # word in a name -> split
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
    "testing": TEST,
    "eval": TEST,
    "evaluation": TEST,
}
WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(KINDS)})(?![a-z])")
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*", re.DOTALL)
LEFT_OUT = "split "  # begins the reason for a file of another split

SplitRule = Callable[[str], str]  # relative name of a file -> why it is left out; empty: it is read


def kind_of(name: str) -> str:
    """Returns train, validation or test by the words in the parts of a relative name; empty if there is none.

    Of several words in one part the last counts (`human-eval-train`), and a part of another split than train counts
    more than one of train.
    """
    kinds = set()
    for part in name.lower().split("/"):
        if words := WORD.findall(part):
            kinds.add(KINDS[words[-1]])
    # Text of a test set in train does more harm than less text.
    for kind in (TEST, VALIDATION, TRAIN):
        if kind in kinds:
            return kind
    return ""


def split_of(name: str) -> str:
    """Returns the split that a shard names (`train_sft` of `data/train_sft-00000-of-00003.parquet`), else
    `kind_of`.
    """
    kind = kind_of(name)
    match = SHARD.fullmatch(PurePosixPath(name).name)
    # In a folder `test/`, `data-00000-of-00002.arrow` names no split.
    if match and (not kind or kind_of(match["split"])):
        return match["split"]
    return kind


def split_rule(wanted_split: str | None, spelled: str = "", held_out: bool = False) -> SplitRule:
    """Returns the rule that decides by split on files that are found in a folder or by a glob.

    Args:
        wanted_split: the split that the source names: one of the three, a word for it (`val`), or that of shards
            (`train_sft`).
        spelled: the part of a glob with magic letters, which may spell a split.
        held_out: nothing of the source is trained on, so without `wanted_split` all splits are read.
    """
    if not wanted_split and held_out:
        return lambda name: ""
    if not wanted_split and (kind := kind_of(spelled)):
        wanted_split = kind

    def rule(name: str) -> str:
        kind, split = kind_of(name), split_of(name)
        if wanted_split:
            is_read = wanted_split == split or KINDS.get(wanted_split) == kind
        else:
            is_read = kind in ("", TRAIN)
        return "" if is_read else f"{LEFT_OUT}{split or 'unknown'}"

    return rule
