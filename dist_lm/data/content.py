"""The content of the corpora that a run trains on: recorded when it starts, compared before it continues.

Content is tokens, lengths, masks and verdicts, in their order. Sources, licences and how documents are cut into tars do
not count, so a corpus that was built again from the same text has the same content.
"""

from collections.abc import Iterable

from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory


def record_content(run: RunDirectory, corpora: Iterable[str]) -> None:
    """Record the content of `corpora` as what `run` trains on."""
    found = {name: read_manifest(run.work.corpus(name)).content for name in corpora}
    durable.write_json(run.corpora, found)


def require_content(run: RunDirectory, corpora: Iterable[str]) -> None:
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
