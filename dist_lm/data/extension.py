"""Extends a finished corpus by sources (`corpus.extends`): only their tasks are surveyed and written.

The tars of the finished corpus are the first ones of the new one, and never change. Its kept decisions
(`data.kept_decisions`) stand for the surveys of its tasks. What it dropped stays dropped; what it wrote stays, or is
excluded for an added document (`data.exclusions`). Its val stays val.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_lm.config.corpus import SPLITS
from dist_lm.data.build_comparison import fates, read_causes, read_texts
from dist_lm.data.build_decisions import (
    CONTAINS_VAL,
    DUPLICATE,
    EXCLUDED,
    NEAR_DUPLICATE,
    TRAIN,
    VAL,
    Rule,
    order_in_tar,
    sorted_keys,
)
from dist_lm.data.build_folder import (
    FATES,
    PRESENT_RUN,
    RUN,
    Build,
    first_documents,
    old_fates,
    read_survey,
    write_first_documents,
)
from dist_lm.data.build_near_duplicates import resembled_sources
from dist_lm.data.earlier import EarlierCorpora
from dist_lm.data.exclusions import Exclusion, read_exclusions, write_exclusions
from dist_lm.data.index import open_index
from dist_lm.data.kept_decisions import KeptDecisions
from dist_lm.data.manifest import read_manifest
from dist_lm.data.shard_writer import read_origins
from dist_lm.data.sorted_runs import RECORD, write_run
from dist_lm.data.task_results import is_finished, writing

REASONS = {DUPLICATE: "duplicate", NEAR_DUPLICATE: "near_duplicate", CONTAINS_VAL: "contains_val"}


@dataclass(frozen=True)
class Extension:
    """A finished corpus that a build adds sources to."""

    directory: Path
    decisions: KeptDecisions
    itself: EarlierCorpora  # the corpus alone
    unseen: Mapping[
        str, EarlierCorpora
    ]  # folder -> a corpus that neither it nor the corpus was compared with the other
    n_val_bytes: int  # of its val


def unpack(build: Build, extension: Extension) -> None:
    """Writes the surveys of the corpus that is extended as results of its tasks.

    Raises:
        OSError: a file cannot be read or written.
    """
    first_of_task, n_written = [], 0
    for number in range(build.n_old):
        result = build.survey(number)
        if not is_finished(result):
            with writing(result) as temporary:
                extension.decisions.unpack(number, temporary)
                # A text that is not there any more makes no other one a copy.
                records = np.fromfile(temporary / RUN, RECORD)
                is_there = np.isin(np.load(temporary / FATES), (TRAIN, VAL))
                write_run(temporary / PRESENT_RUN, records[is_there[records["number"]]])
        first_of_task.append(n_written)
        n_written += int(np.isin(old_fates(build, number), (TRAIN, EXCLUDED)).sum())
    write_first_documents(build, first_of_task)


def causes_of_exclusions(build: Build, rule: Rule) -> np.ndarray:
    """Returns the keys of the added documents for which documents are excluded, as `sorted_keys`. Those of
    near-duplicates are not among them, as searches name them.

    Args:
        rule: complete, but for these keys.

    Raises:
        ArtefactError: a result of the build is damaged.
        OSError: a file cannot be read.
    """
    causes: set[bytes] = set()
    for number in range(build.n_old):
        task_survey = read_survey(build, number)
        # A copy has the key of the document that stays.
        is_copy = (fates(build, number, task_survey, rule) == DUPLICATE) & (old_fates(build, number) == TRAIN)
        causes.update(key.tobytes() for key in task_survey.keys[is_copy])
        causes.update(read_causes(build, number).values())
    return sorted_keys(causes)


def exclude(
    build: Build,
    rule: Rule,
    causes: Mapping[bytes, str],
    held_out_causes: Mapping[bytes, str],
    directory: Path,
    rejected: BinaryIO,
) -> dict[str, Any]:
    """Writes the documents that are excluded, those of the corpus that is extended among them, with a line each in the
    list of dropped documents. Returns the entry for the manifest.

    Args:
        rule: complete.
        causes, held_out_causes: key -> source, of the documents of `causes_of_exclusions`, and of those among them of
            sources with `held_out`.
        directory: of the new corpus.
        rejected: gets a line of JSON for each document that is excluded now.

    Raises:
        ArtefactError: the list of the corpus that is extended is damaged.
        OSError: a file cannot be read or written.
    """
    exclusions = read_exclusions(build.base)
    for exclusion, source, language in _new_exclusions(build, rule, causes, held_out_causes):
        exclusions.append(exclusion)
        line = {"place": source, "reason": exclusion.reason, "error": "", "language": language}
        line |= {"excluded": exclusion.document, "for": exclusion.cause}
        if exclusion.reason == "near_duplicate":
            line["resembles"] = exclusion.cause
        rejected.write((json.dumps(line) + "\n").encode())
    return write_exclusions(directory, exclusions)


def _new_exclusions(
    build: Build, rule: Rule, causes: Mapping[bytes, str], held_out_causes: Mapping[bytes, str]
) -> Iterator[tuple[Exclusion, str, str]]:
    """Yields the documents that are excluded now, each as (exclusion, source, language), in the order of the tars.

    Args:
        causes: key of a new document -> its source, for documents that are dropped as its copies.
        held_out_causes: key of a held-out text of the new sources -> its source.

    Raises:
        ArtefactError: a tar, or a result of the build, is damaged.
        OSError: a file cannot be read.
    """
    tars = iter(read_manifest(build.base).splits[SPLITS[TRAIN]].shards)
    for number in range(build.n_old):
        task_survey, was = read_survey(build, number), old_fates(build, number)
        written = order_in_tar(task_survey, np.isin(was, (TRAIN, EXCLUDED)), is_shuffled=build.config.shuffle_in_tasks)
        if not len(written):
            continue  # it has no tar
        tar = next(tars)
        now = fates(build, number, task_survey, rule)
        places = np.flatnonzero((was[written] == TRAIN) & (now[written] != TRAIN)).tolist()
        if not places:
            continue

        resembled, held_out_in = resembled_sources(build, number), read_causes(build, number)
        origins = read_origins(build.base / tar.name, set(places))
        index = open_index(build.base / tar.name, tar)
        for place, origin in zip(places, origins, strict=True):
            document = int(written[place])
            key, fate = task_survey.keys[document].tobytes(), int(now[document])
            if fate == NEAR_DUPLICATE:
                cause = resembled[document]
            elif fate == DUPLICATE:
                cause = causes[key]
            else:
                held_out = held_out_in[key]
                cause = held_out_causes.get(held_out) or f"val of {read_texts(build).unseen[held_out]}"
            exclusion = Exclusion(first_documents(build)[number] + place, REASONS[fate], cause)
            yield exclusion, origin.source, index.languages[int(index.documents["language"][place])]
