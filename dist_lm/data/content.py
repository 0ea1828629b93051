"""What a corpus was built from, and what a run trains on: recorded, and compared later.

Inputs are the files and URLs that the sources read. Content is what training sees: tokens, lengths, masks and verdicts,
in their order. Sources, licences and how documents are cut into tars do not count, so a corpus that was built again
from the same text has the same content.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.corpus import corpus_sources
from dist_lm.data.inputs import Inputs, changes, inputs_of
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.errors import ArtefactError, UserError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory


def listed_inputs(config: CorpusConfig, name: str) -> list[Inputs]:
    """The inputs of each source of a corpus, as they are now.

    Raises:
        ConfigError, ArtefactError: they cannot be listed.
    """
    return [inputs_of(source) for source in corpus_sources(config, name)]


def inputs_hash(listings: Iterable[Inputs]) -> str:
    """Hash of what sources read. What they leave out does not count."""
    taken = [replace(listing, files=listing.taken).to_json() for listing in listings]
    return hashlib.sha256(json.dumps(taken, sort_keys=True).encode()).hexdigest()


def changed_inputs(config: CorpusConfig, name: str, directory: Path) -> list[str]:
    """How the inputs of a corpus differ from those that it was built from, in words for people.

    Raises:
        ConfigError, ArtefactError: they cannot be listed.
    """
    before = [Inputs.from_json(listing) for listing in read_manifest(directory).inputs]
    now = listed_inputs(config, name) if before else []
    return [words for old, new in zip(before, now, strict=False) for words in changes(old, new)]


def record_content(run: RunDirectory, corpora: Iterable[str]) -> None:
    """Record the content of `corpora` as what `run` trains on."""
    found = {name: read_manifest(run.work.corpus(name)).content for name in corpora}
    durable.write_json(run.corpora, found)


def require_content(run: RunDirectory, corpora: Sequence[str]) -> None:
    """Refuse to continue `run` on other content than it began with. Corpora that are missing are not compared.

    Raises:
        ArtefactError: names the corpus, the splits that differ, and the run.
    """
    recorded = durable.read_json(run.corpora)
    for name in corpora:
        directory = run.work.corpus(name)
        if name not in recorded or not manifest_path(directory).is_file():
            continue
        now, before = read_manifest(directory).content, recorded[name]
        if differing := [split for split in before if now.get(split) != before[split]]:
            split = differing[0]
            raise ArtefactError(
                f"{run.path} began on other content of corpus {name}: the tokens, lengths or masks of "
                f"{' and '.join(differing)} in {directory} have changed (hash {now.get(split, '')[:12]}, was "
                f"{before[split][:12]}): restore that corpus, or choose another run_id"
            )


def require_inputs(run: RunDirectory, config: CorpusConfig, corpora: Sequence[str]) -> None:
    """Refuse to continue `run` if a corpus would be built again first, because its inputs have changed.

    Raises:
        ArtefactError: names the corpus and its inputs.
    """
    for name in corpora:
        if not manifest_path(run.work.corpus(name)).is_file():
            continue
        try:
            changed = changed_inputs(config, name, run.work.corpus(name))
        except UserError:
            continue  # the corpus is used as it is; the plan says so
        if changed:
            raise ArtefactError(
                f"{run.path} began before the inputs of corpus {name} changed ({'; '.join(changed)}): restore them, "
                "choose another run_id, or run stage=shards first: the run continues if the content is the same"
            )
