"""The inputs of a run of stage `evaluate`, in `prompts.json`: all figures of a run come from the same files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.config.evaluation import FIXED_TESTS, OWN_TESTS
from dist_lm.config.root import Config
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.data.prompts import find_prompts
from dist_lm.errors import ArtefactError
from dist_lm.stages.generate.inputs import label_of
from dist_lm.stages.shards.identity import folder_of
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.stages.evaluate.stage import EvaluateRunConfig

PROMPTS, CORPUS = "eval.prompts=", "corpus "  # beginnings of names of inputs
TESTS = "eval.tests"  # name of the version of the tests of our own problems


def inputs_of(config: "EvaluateRunConfig") -> dict[str, str]:
    """Returns the SHA-256 (hexadecimal) of the files that the figures come from: `eval.TASK=PATH`, and each
    checkpoint's manifest.

    A corpus counts by the hash of its documents. A checkpoint or corpus that is gone is left out: the figures of a
    finished run stay.

    Args:
        config: as `look` returns it, with the paths of checkpoints.

    Raises:
        ConfigError: there is no file of prompts, for the task reward.
        ArtefactError: the manifest of a corpus is damaged.
        OSError: a file cannot be read.
    """
    from dist_lm.evaluation.tasks import BITS

    tasks = config.stage.tasks
    paths = {f"eval.{task}={path}": path for task, path in config.eval.files.items() if task in tasks}
    if "reward" in tasks:
        paths |= {f"{PROMPTS}{path}": path for path in find_prompts(config.eval.prompts, "eval.prompts")}
        reward = config.eval.reward_model
        paths[f"eval.reward_model={reward}"] = Path(reward) / checkpoint_files.MANIFEST
    paths |= {f"stage.models={path}": Path(path) / checkpoint_files.MANIFEST for path in config.stage.models}
    hashes = {name: durable.sha256_of(path) for name, path in paths.items() if path.is_file()}

    corpora = list(config.stage.corpora) if BITS in tasks else []
    if "tools" in tasks:
        corpora.append("tools")
    for name in corpora:
        folder = corpus_folder(config, name)
        if manifest_path(folder).is_file():
            hashes[f"{CORPUS}{name}"] = read_manifest(folder).splits["val"].content
    return hashes


def corpus_folder(config: Config, name: str) -> Path:
    """Returns the folder of a corpus that figures come from: that of the configured sources if it is finished, else the
    folder NAME, which may be missing.

    Raises:
        ConfigError: a source is invalid.
        ArtefactError: a manifest or journal of this name is damaged.
        OSError: a file cannot be read.
    """
    named = config.corpus_in(WorkDirectory(Path(config.work_dir)), name)
    is_the_only_one = not any(named.parent.glob(f"{name}-????????"))
    if is_the_only_one or name not in config.corpus.corpora or name in config.corpus.folders:
        return named
    folder = folder_of(config, name)
    return folder if manifest_path(folder).is_file() else named


def begun_with(run: RunDirectory) -> dict[str, str]:
    """Returns the recorded inputs of a run, in the form of `inputs_of`; nothing for a new run."""
    return durable.read_json(run.inputs)


def version_of_tests(run: RunDirectory) -> int:
    """Returns the version of the tests of our own problems that the run began with; that of this release for a new
    run."""
    if not run.inputs.exists():
        return OWN_TESTS
    return int(begun_with(run).get(TESTS, FIXED_TESTS))


def refuse_other_inputs(run: RunDirectory, config: "EvaluateRunConfig") -> None:
    """Refuses to show or to go on with figures of files that have changed since. Inputs that are gone are not compared.

    Raises:
        ArtefactError: names the key, the file and the way out.
        ConfigError: as `inputs_of`.
        OSError: a file cannot be read.
    """
    # Inputs that are gone are not compared: the figures of a finished run stay.
    recorded, current = begun_with(run), inputs_of(config)
    changed = [name for name, sha256 in current.items() if recorded.get(name, sha256) != sha256]
    if prompts := _with_prefix(recorded, PROMPTS):
        changed += sorted(prompts ^ _with_prefix(current, PROMPTS))  # a glob finds other files
    if corpora := _with_prefix(recorded, CORPUS):
        changed += sorted(_with_prefix(current, CORPUS) - corpora)  # one that was not there
    for name in changed:
        raise ArtefactError(f"{name}: has changed since {run.path} began: choose another run_id")


def _with_prefix(inputs: Mapping[str, str], prefix: str) -> set[str]:
    return {name for name in inputs if name.startswith(prefix)}


def table_of(run: RunDirectory) -> Path:
    """Returns the file with a line for a figure."""
    return run.samples / "table.jsonl"


def labels_of(checkpoints: Sequence[Path]) -> list[str]:
    """STAGE/RUN_ID/STEP of each checkpoint; where these are equal, as much of the paths as tells them apart."""
    # STAGE/RUN_ID/STEP is short, but copies of work directories share it.
    labels = [label_of(path) for path in checkpoints]
    for parts in range(4, max(len(path.parts) for path in checkpoints) + 1):
        ambiguous = {label for label, number in Counter(labels).items() if number > 1}
        pairs = zip(labels, checkpoints, strict=True)
        labels = ["/".join(path.parts[-parts:]) if label in ambiguous else label for label, path in pairs]
    return labels
