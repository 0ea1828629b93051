"""The pass `compare` of a build by tasks, and what becomes of each document by the results of the passes before it.

Train of each task is compared with all held-out texts. Where a corpus is extended, its train was compared with most of
them when it was built: it is read again from its tars, and compared with those alone that are new to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.config.corpus import SPLITS
from dist_lm.data.build_decisions import (
    CONTAINS_VAL,
    DUPLICATE,
    EXCLUDED,
    NEAR_DUPLICATE,
    TRAIN,
    Rule,
    Survey,
    compare,
    fates_of,
    is_among,
    key_array,
    order_in_tar,
    refused_texts,
    source_of,
)
from dist_lm.data.build_folder import (
    ARRAYS,
    Build,
    compressed,
    decompressed,
    first_documents,
    is_copy,
    old_fates,
    read_again,
    read_survey,
)
from dist_lm.data.build_near_duplicates import is_near_copy
from dist_lm.data.containment import Evidence, HeldOutIndex
from dist_lm.data.earlier import SPAN, Span, decode, forms_of
from dist_lm.data.screening import text_key
from dist_lm.data.task_results import is_finished, writing
from dist_lm.tokenizer.tokenizer import Tokenizer

WINDOWS = "windows_"  # begins the name of an array about windows of a number of words


def fates(build: Build, number: int, task_survey: Survey, rule: Rule) -> np.ndarray:
    """Returns what becomes of each document of a task, as `fates_of`: (D,) int8 of `TRAIN` to `CONTAINS_VAL`.

    Args:
        number: of the task.
        rule: with an empty one, no document is held out or dropped for what others contain.

    Returns:
        Of a task of the corpus that is extended, what became of them there, `EXCLUDED` included; for a train document
        that is excluded now, the reason.

    Raises:
        ArtefactError: a file is damaged.
        OSError: a file cannot be read or written.
    """
    task = build.task(number)
    copies = is_copy(build, number, len(task_survey.keys))
    near_copies = is_near_copy(build, number, len(task_survey.keys))
    if number < build.n_old:
        task_fates = np.array(old_fates(build, number))
        is_train = task_fates == TRAIN
        task_fates[is_train & is_among(task_survey.keys, rule.excluded)] = CONTAINS_VAL
        task_fates[is_train & near_copies] = NEAR_DUPLICATE
        task_fates[is_train & copies] = DUPLICATE
        return task_fates

    share = rule.shares.get(task.corpus, 0.0)
    return fates_of(task_survey, copies, near_copies, source_of(build.config, task).held_out, share, rule)


@dataclass(frozen=True)
class Val:
    """The held-out texts that tasks compare train with."""

    shares: dict[str, float]  # corpus -> share of the groups that is held out
    texts: dict[bytes, str]  # key -> text
    protected: set[bytes]  # keys of texts that train gives way to: of sources with `held_out`, and of earlier corpora
    n_own: int  # the texts behind these are of earlier corpora
    is_redacted: bool  # whether texts of earlier corpora have placeholders
    # keys of texts for which documents of the corpus that is extended are excluded
    excluding: set[bytes] = field(default_factory=set)
    # key -> folder, of texts of earlier corpora that the corpus that is extended was not compared with
    unseen: dict[bytes, str] = field(default_factory=dict)


def write_val(build: Build, val: Val) -> None:
    """Writes the held-out texts of all corpora for the tasks that compare.

    Raises:
        OSError: a file cannot be read or written.
    """
    result = build.result("val", 0)
    if is_finished(result):
        return
    with writing(result) as temporary:
        content = {
            "shares": val.shares,
            "texts": {key.hex(): text for key, text in val.texts.items()},
            "protected": sorted(key.hex() for key in val.protected),
            "n_own": val.n_own,
            "is_redacted": val.is_redacted,
            "excluding": sorted(key.hex() for key in val.excluding),
            "unseen": {key.hex(): folder for key, folder in val.unseen.items()},
        }
        (temporary / "val.zst").write_bytes(compressed(content))


@lru_cache(1)
def read_texts(build: Build) -> Val:
    content = decompressed((build.result("val", 0) / "val.zst").read_bytes())
    return Val(
        content["shares"],
        {bytes.fromhex(key): text for key, text in content["texts"].items()},
        {bytes.fromhex(key) for key in content["protected"]},
        content["n_own"],
        content["is_redacted"],
        {bytes.fromhex(key) for key in content["excluding"]},
        {bytes.fromhex(key): folder for key, folder in content["unseen"].items()},
    )


@lru_cache(1)
def read_val(build: Build) -> tuple[Val, HeldOutIndex]:
    """Returns the held-out texts and their index, whose texts are in the order of `Val.texts`.

    A process makes the index once, so what the index has found in train stays from one call to the next.
    """
    val = read_texts(build)
    return val, HeldOutIndex([*val.texts.values()], [key in val.protected for key in val.texts])


@dataclass(frozen=True)
class NewVal:
    """The held-out texts that train of the corpus that is extended was not compared with, in the forms of its tars."""

    keys: list[bytes]  # of the text of each form
    key_of_form: dict[bytes, bytes]  # key of a form -> that of its text
    excluding: frozenset[bytes]  # as in `Val`
    index: HeldOutIndex  # of the forms


@lru_cache(1)
def read_new_val(build: Build) -> NewVal:
    """Returns the held-out texts that train of the extended corpus was not compared with: those of the new sources, and
    those of its val that it has not seen.

    A process makes their index once, as in `read_val`.
    """
    val = read_texts(build)
    new_keys = [*list(val.texts)[: val.n_own], *val.unseen]
    # Tars hold placeholders where sources have secrets and addresses, so both forms of a text are compared.
    forms = [(key, form) for key in new_keys for form in forms_of(val.texts[key])]
    return NewVal(
        [key for key, _ in forms],
        {text_key(form.encode()): key for key, form in forms} | {key: key for key in new_keys},
        frozenset(val.excluding),
        HeldOutIndex([form for _, form in forms], [key in val.excluding for key, _ in forms]),
    )


def compare_train(build: Build, number: int, result: Path) -> None:
    """Compares train of a task with the held-out texts; writes to the folder `result` what it has of them, and which
    documents are refused.

    Raises:
        ChangedInputError: the inputs of the task hold other documents than at the survey.
        ArtefactError: an earlier result of the build is damaged.
        OSError: a file cannot be read or written.
    """
    if number < build.n_old:
        _compare_old(build, number, result)
        return
    val, index = read_val(build)
    index.take_evidence()  # of a task that failed
    task_survey = read_survey(build, number)
    task_fates = fates(build, number, task_survey, Rule(val.shares))
    documents = (record for _, record, _ in read_again(build, number, task_survey) if record is not None)
    refused = compare(index, val.protected, val.is_redacted, task_fates, documents)
    evidence = index.take_evidence()
    _save_comparison(result, evidence, refused=refused)


def _compare_old(build: Build, number: int, result: Path) -> None:
    """Compares train of the corpus that is extended, as its tars have it, with the held-out texts that are new to it,
    and writes the outcome to `result`. Texts that contain one of `Val.excluding` are refused.

    Without a new held-out text no tar is read.

    Raises:
        ArtefactError: a tar, or a result of the build, is damaged.
        OSError: a file cannot be read or written.
    """
    new_val = read_new_val(build)
    causes: dict[bytes, bytes] = {}  # key of a refused text -> that of the held-out text
    new_val.index.take_evidence()  # of a task that failed

    def texts() -> Iterator[tuple[bytes, bytes]]:
        for key, text in _texts_of_old(build, number, read_survey(build, number)):
            equal_keys = [new_val.key_of_form.get(form) for form in (key, text_key(text))]
            cause = next((equal for equal in equal_keys if equal in new_val.excluding), None)
            if cause:
                causes[key] = cause
            else:
                yield key, text

    # Without a new text nothing is read.
    if new_val.keys:
        for key, text in refused_texts(new_val.index, texts(), has_protected=bool(new_val.excluding)):
            causes[key] = new_val.keys[new_val.index.most_contained(text)]
    refused = sorted(causes)
    _save_comparison(
        result,
        new_val.index.take_evidence(),
        refused=key_array(refused),
        causes=key_array([causes[key] for key in refused]),
    )


def _texts_of_old(build: Build, number: int, task_survey: Survey) -> Iterator[tuple[bytes, bytes]]:
    """Yields key and text (UTF-8) of each document of a task of the corpus that is extended that is still train, in the
    order of its tars.

    Raises:
        ArtefactError: a tar, or a result of the build, is damaged.
        OSError: a file cannot be read.
    """
    was = old_fates(build, number)
    is_written = (was == TRAIN) | (was == EXCLUDED)
    is_shuffled = build.config.shuffle_in_tasks
    documents = order_in_tar(task_survey, is_written, is_shuffled=is_shuffled)
    is_train = fates(build, number, task_survey, Rule({})) == TRAIN
    first, tokenizer = first_documents(build)[number], Tokenizer.load(build.tokenizer_model)
    for begin in range(0, len(documents), SPAN):
        part = documents[begin : begin + SPAN]
        span = Span(build.base, SPLITS[TRAIN], first + begin, first + begin + len(part))
        # What the tars exclude is not decoded.
        for document, decoded in zip(part[was[part] == TRAIN].tolist(), decode(tokenizer, span), strict=True):
            if is_train[document]:
                yield task_survey.keys[document].tobytes(), decoded.text.encode()


def _save_comparison(result: Path, evidence: Evidence, **keys: np.ndarray) -> None:
    arrays: dict[str, Any] = {f"{WINDOWS}{size}": in_train for size, in_train in evidence.in_train.items()}
    short = np.array(sorted(evidence.contained_short), np.int64)
    np.savez_compressed(result / ARRAYS, short=short, **keys, **arrays)


def merge_comparison(build: Build, number: int, index: HeldOutIndex) -> np.ndarray:
    """Adds what the train texts of a task have of val to `index`. Returns the keys of the refused train texts: sorted,
    (refused, KEY) uint8."""
    with np.load(build.result("compare", number) / ARRAYS) as arrays:
        windows = (name for name in arrays.files if name.startswith(WINDOWS))
        in_train = {int(name.removeprefix(WINDOWS)): arrays[name] for name in windows}
        index.merge(Evidence(in_train, frozenset(arrays["short"].tolist())))
        return arrays["refused"]


def read_causes(build: Build, number: int) -> dict[bytes, bytes]:
    """Returns the documents of a task of the corpus that is extended that contain a held-out text which is new to it:
    key of the document -> key of that text."""
    with np.load(build.result("compare", number) / ARRAYS) as arrays:
        return {key.tobytes(): cause.tobytes() for key, cause in zip(arrays["refused"], arrays["causes"], strict=True)}
