"""Writes the tars of corpora.

`build_corpus` writes one corpus in this process, while other processes encode its documents; corpora are built one
after the other. `build_by_tasks` builds them by tasks in parallel (`corpus.build=tasks`).
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.chat.documents import encode_document, sample_documents
from dist_lm.config.corpus import TRAIN
from dist_lm.config.root import Config
from dist_lm.data.ingest import TextSplits, split_documents
from dist_lm.data.inputs import HUB, Inputs
from dist_lm.data.journal import REJECTED, is_dropped_for_inputs
from dist_lm.data.manifest import listed_inputs, read_manifest
from dist_lm.data.screening import IngestReport
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.sources.reader import corpus_sources, text_corpora, tokenizer_corpora
from dist_lm.document import Document
from dist_lm.errors import ArtefactError
from dist_lm.stages.shards.extends import extension_of, n_sources_of, require_extensible
from dist_lm.stages.shards.identity import (
    BESIDE,
    corpora_of_settings,
    corpora_read,
    corpus_fingerprint,
    digest,
    finished_corpora,
    licences_of,
    recipe_of,
)
from dist_lm.stages.shards.other_corpora import require_compared
from dist_lm.storage import durable
from dist_lm.storage.process import cores
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.encode import Encode, encode_documents
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.data.task_workers import RunPass
    from dist_lm.tracking.console import Console


def build_corpus(
    config: Config, name: str, text_splits: TextSplits, console: "Console", encode: Encode = encode_document
) -> None:
    """Writes the tars of one corpus. Tars that an interrupted build finished are kept; the manifest, last, completes
    it.

    Rows that cannot be read are written to a file beside the tars. If the inputs changed, the finished tars are dropped
    (a warning, if some are on the hub).

    Args:
        text_splits: decides the splits of the corpora of texts.

    Raises:
        ArtefactError: the sources give other or fewer documents than the finished tars hold or none for a split, too
            many rows are broken, the tokenizer is missing, or the folder holds files of others.
        ChangedInputError: a file changed since it was listed; no manifest is written.
        ConfigError: a source is invalid.
        UserError: a source cannot be read, or is not Unicode.
        OSError: a file cannot be read or written.
    """
    work = WorkDirectory(Path(config.work_dir))
    report = IngestReport()
    sources = corpus_sources(config.corpus, name)
    directory = config.corpus_in(work, name)
    inputs = listed_inputs(config.corpus, name, text_splits.reader.files)
    recipe = recipe_of(config, name, text_splits)

    name_unread_archives(name, inputs, console)
    # A branch of the hub may have moved on since an earlier build, whose tars are then dropped.
    heads = [f"{file.name} {file.etag}" for listing in inputs for file in listing.taken if file.name.startswith(HUB)]
    if heads and is_dropped_for_inputs(directory, recipe):
        console.warning(
            f"corpus {name} is built from the beginning: inputs changed after an earlier build began. `revision` of a "
            f"source keeps it at one commit; those read now: {', '.join(heads)}"
        )

    # (split, source, hash of the text) of each document that the encoder has not returned yet; it returns them in order
    origins: deque[tuple[str, int, bytes]] = deque()
    with (
        CorpusWriter(directory, recipe) as writer,
        (directory / REJECTED).open("w", encoding="utf-8") as rejected,
        console.counting(f"tokenizing {name}", unit="documents") as count,
    ):
        # Documents in finished tars that are still to be skipped, by split.
        n_finished = dict(writer.kept)

        # A template may ask for several samples of a conversation; each is a document of the tars.
        tokenizer = Tokenizer.load(work.tokenizer_model)

        def documents() -> Iterator[Document]:
            for split, whole_document, source in split_documents(
                config.corpus, name, config.seed, report, text_splits, rejected
            ):
                for document in sample_documents(whole_document, tokenizer):
                    content = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
                    if n_finished[split]:
                        n_finished[split] -= 1
                        writer.pass_over(split, content)
                        count.advance()
                    else:
                        origins.append((split, sources.index(source), content))
                        yield document

        for document in encode_documents(work.tokenizer_model, documents(), config.tokenizer.workers, encode):
            split, source, content = origins.popleft()
            # Documents of train come first, so the first of val completes the tars of train.
            if split == "val":
                writer.finish_split("train")
            writer.write(split, document, source, content)
            count.advance()

        if any(n_finished.values()):
            raise ArtefactError(
                f"corpus {name}: its sources give fewer documents than the finished tars of {directory} hold: "
                "they have changed; remove that folder to build it again"
            )
        listed = [listing.to_json() for listing in inputs]
        read = {corpus: text_splits.reader.documents(corpus) for corpus in corpora_read(config, name, text_splits)}
        settings = corpus_fingerprint(config, name, text_splits.together)
        writer.finish(asdict(report), licences_of(config, name), listed, settings, read)


def workers_of(config: Config) -> AbstractContextManager["RunPass"]:
    """Returns what runs the tasks of a build: all nodes of a Ray cluster, or processes of this machine, where Ray would
    only cost its start.

    Raises:
        ClusterError: on entering, the cluster cannot be joined.
        UserError: from the `RunPass`, when workers die again and again.
    """
    if config.cluster.name == "ray":
        from dist_lm.cluster.build_workers import ray_workers

        return ray_workers(config.cluster)
    from dist_lm.data.task_workers import local_workers

    return local_workers(config.tokenizer.workers or cores())


def name_unread_archives(name: str, inputs: Sequence[Inputs], console: "Console") -> None:
    """Names the archives that no reader of a corpus opens."""
    for listing in inputs:
        if hint := listing.unread_archives():
            console.line(f"corpus {name}: {hint}")


def build_by_tasks(
    config: Config, names: Sequence[str], missing: Sequence[str], text_splits: TextSplits, console: "Console"
) -> None:
    """Builds corpora of texts by tasks (`corpus.build=tasks`) in processes of this machine or of a Ray cluster; results
    of tasks of an interrupted build are used again.

    Args:
        config: as returned by `with_folders`.
        names: corpora to build.
        missing: all corpora that are missing.
        text_splits: holds the corpora that are compared; it reads none.

    Raises:
        ArtefactError: as `require_compared`; or as `run_passes`, whose other errors pass.
        OSError: a file cannot be read or written.
        UserError: an input cannot be listed.
    """
    # Imported here, because runs that find their corpora need none of it.
    from dist_lm.data.build_by_tasks import plan_of, publish, run_passes
    from dist_lm.data.build_folder import Build
    from dist_lm.data.build_plan import plan_fingerprint
    from dist_lm.data.build_tasks import IN_TURN, REVISION, sizes_of_pass
    from dist_lm.data.task_results import has_result
    from dist_lm.data.unfinished_builds import begin_pass

    extension, n_old_sources = None, 0
    if names[0] in config.corpus.extends:
        require_extensible(config, names[0], text_splits.reader.files)
        extension = extension_of(config, names[0], text_splits.earlier)
        n_old_sources = n_sources_of(extension.directory)
    together, list_inputs = text_splits.together, text_splits.reader.files
    work = WorkDirectory(Path(config.work_dir))
    # Of a corpus that is not compared only its texts count, which drop equal ones of later corpora.
    earlier_names = {before for name in together for before in corpora_of_settings(config, name)}
    read_names = [name for name in text_corpora(config.corpus) if name in {*together, *earlier_names}]
    old_tasks = extension.decisions.tasks(names[0]) if extension else []
    tasks, listings = plan_of(config.corpus, read_names, list_inputs, old_tasks=old_tasks, n_old_sources=n_old_sources)
    recipes = {name: recipe_of(config, name, text_splits) for name in names}
    key = digest(
        [REVISION, asdict(config.corpus), plan_fingerprint(tasks), [asdict(recipe) for recipe in recipes.values()]]
    )
    build = Build(work.path.resolve() / "builds" / key[:16])
    tell_of_builds(build.folder, console)
    base = extension.directory if extension else None
    build.write(config.corpus, config.seed, work.tokenizer_model, tasks, listings, base, len(old_tasks))

    with workers_of(config) as workers:

        def run_pass(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
            begin_pass(folder, names, pass_name, len(numbers))
            sizes = sizes_of_pass(tasks, pass_name, numbers)
            finished_numbers = [number for number in numbers if has_result(build.result(pass_name, number))]
            with console.tasks(f"{pass_name} of {', '.join(names)}", sizes, finished_numbers) as progress:
                batches = [[number] for number in numbers] if pass_name in IN_TURN else [numbers]
                for batch in batches:
                    yield from map(progress.ended, workers(folder, pass_name, batch))

        run_passes(build.folder, tasks, run_pass, names, together, text_splits.earlier, text_splits.reader, extension)
    require_compared(config, missing, text_splits)

    for name in names:
        inputs = listed_inputs(config.corpus, name, list_inputs)
        name_unread_archives(name, inputs, console)
        publish(
            build,
            tasks,
            name,
            config.corpus_in(work, name),
            recipes[name],
            licences=licences_of(config, name),
            inputs=[listing.to_json() for listing in inputs],
            settings=corpus_fingerprint(config, name, together),
            # The documents of the corpus that is extended were not read again.
            documents={} if extension else {corpus: text_splits.reader.documents(corpus) for corpus in together},
        )
    shutil.rmtree(build.folder)


def tell_of_tokenizer(config: Config, missing: Sequence[str], console: "Console") -> None:
    """Says which of the corpora to build a trained tokenizer was not trained on: their inputs or settings have changed
    since it wrote other corpora of these names.

    Args:
        config: as returned by `with_folders`.
        missing: corpora to build.

    Raises:
        ArtefactError: there is no tokenizer, or a manifest is damaged.
    """
    if config.tokenizer.source != TRAIN:
        return  # the user has chosen it
    work = WorkDirectory(Path(config.work_dir))
    sha256 = durable.sha256_of(work.tokenizer_model)
    written = {
        folder.name for folder in finished_corpora(work) if read_manifest(folder).recipe.tokenizer_sha256 == sha256
    }

    def is_other_content(folder: str, name: str) -> bool:
        return folder == name or (BESIDE.fullmatch(folder) is not None and folder[: -len("-1a2b3c4d")] == name)

    changed = [
        name
        for name in tokenizer_corpora(config.corpus)
        if name in missing
        and any(is_other_content(folder, name) for folder in written - {config.corpus_in(work, name).name})
    ]
    if changed:
        console.line(
            f"{work.tokenizer} is kept, trained on earlier sources of {', '.join(changed)}: to train one on those of "
            "now, give another work_dir; with tokenizer=keep this line is not shown"
        )


def tell_of_builds(folder: Path, console: "Console") -> None:
    """Says whether a build goes on, and which builds of other settings or inputs were not finished.

    Raises:
        OSError: a file cannot be read.
    """
    from dist_lm.data.unfinished_builds import unfinished_builds

    for build in unfinished_builds(folder.parent.parent):
        if build.folder == folder:
            console.line(f"{build.text()}: goes on, results that are there are used")
        else:
            console.line(f"{build.text()}; of other settings or inputs: remove it if nothing goes on with it")
