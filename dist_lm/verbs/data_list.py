"""The verb `data list`: the corpora of a work directory, what they were made from, and which runs use them; builds by
tasks that are not complete."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_lm.data.journal import journal_recipe
from dist_lm.data.manifest import Manifest, manifest_path, read_manifest, remote_path
from dist_lm.data.sources.reader import READERS
from dist_lm.data.unfinished_builds import unfinished_builds
from dist_lm.errors import ArtefactError
from dist_lm.stages.shards.identity import BESIDE
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.readable import listed, readable_count

NAMED_RUNS = 3  # runs that a line names
COLUMNS = ("form", "documents", "train tokens", "val tokens", "built", "first source", "used by")
NARROWEST_TABLE = 110  # characters, beside those of the longest name: below, each corpus is a paragraph


@dataclass(frozen=True)
class ListedCorpus:
    """One folder of `work/corpora`."""

    folder: Path
    state: str  # finished | unfinished | damaged | of others
    built: float  # when its manifest was written, seconds since the epoch; 0: it has none
    runs: tuple[str, ...]  # STAGE/RUN_ID of the runs that have recorded it
    manifest: Manifest | None  # None: the corpus is not finished
    url: str = ""  # where the tars of an attached corpus are


def list_corpora(work: WorkDirectory) -> list[ListedCorpus]:
    """Returns every folder of `work/corpora`, by name. Reads manifests and the records of all runs, no tar.

    A corpus that cannot be read is no error; its state tells.

    Raises:
        ArtefactError: there is no such work directory, or the record of a run is damaged.
    """
    corpora = work.path / "corpora"
    if not corpora.is_dir():
        raise ArtefactError(f"{corpora}: there is no such folder; expected a work directory with corpora")
    runs_of: dict[str, list[str]] = {}
    for stage in sorted(path.name for path in (work.path / "runs").glob("[!.]*") if path.is_dir()):
        for run in work.runs(stage):
            for folder in set(run.corpus_folders().values()):
                runs_of.setdefault(folder, []).append(f"{stage}/{run.path.name}")
    folders = sorted(path for path in corpora.iterdir() if path.is_dir())
    return [_listed_corpus(folder, tuple(runs_of.get(folder.name, ()))) for folder in folders]


def print_corpora(work: WorkDirectory, console: Console, *, unused: bool) -> None:
    """Prints a line for each unfinished build by tasks, and a table of the corpora; on a narrow terminal, a paragraph
    for each.

    Args:
        unused: print instead the commands that remove the finished corpora that no run of this work directory uses.

    Raises:
        ArtefactError: as `list_corpora`, unless there is an unfinished build.
    """
    builds = unfinished_builds(work.path)
    # The first build by tasks of a work directory makes the folder of corpora at its end.
    corpora = list_corpora(work) if (work.path / "corpora").is_dir() or not builds else []
    if unused:
        for corpus in corpora:
            if corpus.state == "finished" and not corpus.runs:
                console.print(Text(shlex.join(["rm", "-r", str(corpus.folder)])), soft_wrap=True)
        return

    for build in builds:
        console.print(Text(build.text()), soft_wrap=True)
    if not corpora:
        console.print(Text(f"no corpus in {work.path / 'corpora'}"), soft_wrap=True)
        return

    # The name of a folder is a value of corpus.folders, so that no character of it may be left out.
    longest = max((len(corpus.folder.name) for corpus in corpora), default=0)
    if console.width < NARROWEST_TABLE + longest:
        for corpus in corpora:
            name, *cells = _cells(corpus)
            console.print(Text(name, style="bold"), soft_wrap=True)
            for column, cell in zip(COLUMNS, cells, strict=True):
                if cell:
                    console.print(Text(f"  {column}: {cell}"), soft_wrap=True)
        return

    table = Table()
    table.add_column("folder", no_wrap=True, min_width=longest)
    for column in COLUMNS:
        is_number = column.endswith(("documents", "tokens"))
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for corpus in corpora:
        table.add_row(*map(Text, _cells(corpus)))
    console.print(table)


def _listed_corpus(folder: Path, runs: tuple[str, ...]) -> ListedCorpus:
    path = manifest_path(folder)
    try:
        if path.is_file():
            record = durable.read_json(remote_path(folder))  # empty: the corpus is not attached
            manifest = read_manifest(folder)
            return ListedCorpus(folder, "finished", path.stat().st_mtime, runs, manifest, record.get("url", ""))
        state = "of others" if journal_recipe(folder) is None else "unfinished"
    except ArtefactError:
        # `data inspect` says what is wrong; the other corpora are listed all the same.
        state = "damaged"
    return ListedCorpus(folder, state, 0.0, runs, None)


def _cells(corpus: ListedCorpus) -> Sequence[str]:
    """Returns the columns of one corpus."""
    used_by = listed(corpus.runs, NAMED_RUNS) if corpus.runs else "no run"
    if corpus.manifest is None:
        return corpus.folder.name, corpus.state, "", "", "", "", "", used_by

    sources = _sources(corpus.folder.name, corpus.manifest)
    first: Mapping[str, Any] = sources[0] if sources else {}
    form, _ = READERS.get(first.get("reader", ""), ("", ""))
    paths = first.get("path") or []
    origin = first.get("dataset") or (paths[0] if paths else first.get("reader", ""))
    if len(sources) > 1 or len(paths) > 1:
        origin += " ..."
    # The name of an attached folder need not be that of a corpus of the manifest.
    origin = corpus.url or origin
    train, val = (corpus.manifest.splits[split].counts for split in ("train", "val"))
    return (
        corpus.folder.name,
        form,
        f"{train.documents + val.documents:,}",
        readable_count(train.tokens),
        readable_count(val.tokens),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(corpus.built)),
        origin,
        used_by,
    )


def _sources(folder: str, manifest: Manifest) -> Sequence[Mapping[str, Any]]:
    """Returns the sources of a corpus as its manifest has them; none in manifests of early releases."""
    corpora = manifest.settings.get("corpus", {}).get("corpora", {})
    name = folder
    # Another content of a corpus lies beside its folder, under the name and a hash.
    if folder not in corpora and BESIDE.fullmatch(folder):
        name = folder.rpartition("-")[0]
    return corpora.get(name, ())
