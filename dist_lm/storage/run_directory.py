"""Names the paths below the work directory, and notes the hashes of files that a run began with.

No other module knows these names.

work/
  tokenizer/{tokenizer.model or tokenizer.json, report.json}
  corpora/NAME/{train,val}-000000.tar + .index, manifest.json     NAME-1a2b3c4d: another content of that name
  runs/STAGE/RUN_ID/
    config.yaml corpora.json noted_files.json metrics.jsonl result.json reference.safetensors
    checkpoints/step_00000100/ ... LATEST BEST
    averages/last_4_step_00000100/ ...
    logs/rank_00000.log   samples/   wandb/   profile/   evaluations/
  runs/generate/RUN_ID/
    config.yaml prompts.json metrics.jsonl samples/part-00000.jsonl ... wandb/ result.json
  runs/import/NAME/
    config.yaml checkpoints/ tokenizer/ chat_template.jinja conf/model/NAME.yaml
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

_TESTS = "eval.tests"  # in noted_files.json

CommandState = Literal["running", "done", "failed", "stopped"]
StageState = Literal["waiting", CommandState]
"""State of a stage in the record of a command."""

_COMMAND_KINDS: dict[str, durable.Kind] = {  # types in the record of a command
    **dict.fromkeys(("run_id", "host", "state", "error"), str),
    **dict.fromkeys(("started", "updated"), (int, float)),
    **dict.fromkeys(("command", "stages"), list),
    "process": int,
}
_STAGE_TEXTS = ("name", "state", "detail")  # texts of each stage of that record


def tokenizer_in(folder: Path) -> Path:
    """Returns the path of the tokenizer in a folder: `tokenizer.json` if it exists, else `tokenizer.model`."""
    hugging_face = folder / "tokenizer.json"
    return hugging_face if hugging_face.exists() else folder / "tokenizer.model"


@dataclass(frozen=True)
class WorkDirectory:
    """The tokenizer and corpora that all runs share, and the directories of the runs."""

    path: Path

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def tokenizer_model(self) -> Path:
        """`tokenizer.json` of Hugging Face if it is there, else `tokenizer.model` of SentencePiece."""
        return tokenizer_in(self.tokenizer)

    @property
    def tokenizer_report(self) -> Path:
        return self.tokenizer / "report.json"

    @property
    def build_lock(self) -> Path:
        """Lock held by the command that builds tokenizer or corpora."""
        return self.path / ".build.lock"

    def corpus(self, name: str) -> Path:
        return self.path / "corpora" / name

    def corpus_manifest(self, name: str) -> Path:
        return self.corpus(name) / "manifest.json"

    def pipeline(self, stage: str, run_id: str) -> Path:
        """JSON with the status of the last command for `stage` and `run_id`, stage by stage."""
        return self.path / "pipelines" / f"{stage}-{run_id}.json"

    def pipeline_lock(self, name: str) -> Path:
        """Lock held by the command whose `pipeline` file has this name."""
        return self.path / "pipelines" / f".{name}.lock"

    def commands(self) -> dict[str, dict[str, Any]]:
        """Returns the records of the commands on this directory by the names of their `pipeline` files, newest last.

        Raises:
            ArtefactError: a record is damaged.
        """
        paths = sorted((self.path / "pipelines").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: _command(path) for path in paths}

    def runs(self, stage: str) -> list["RunDirectory"]:
        """Returns the existing runs of a stage, ordered by name."""
        # A hidden folder is a run that an import has not completed.
        return [RunDirectory(path) for path in sorted((self.path / "runs" / stage).glob("[!.]*")) if path.is_dir()]

    def run(self, stage: str, run_id: str) -> "RunDirectory":
        return RunDirectory(self.path / "runs" / stage / run_id)


@dataclass(frozen=True)
class RunDirectory:
    """One run of one stage."""

    path: Path

    @property
    def work(self) -> WorkDirectory:
        """The work directory that contains this run (`work/runs/STAGE/RUN_ID`)."""
        return WorkDirectory(self.path.parents[2])

    @property
    def config(self) -> Path:
        """The resolved configuration, read by every rank."""
        return self.path / "config.yaml"

    @property
    def corpora(self) -> Path:
        """JSON, corpus -> {split: hash of the content that the run trains on, "folder": name of its folder}."""
        return self.path / "corpora.json"

    def corpus_folders(self) -> dict[str, str]:
        """Returns the folders in `work/corpora` that the run trains on, by corpus; empty before it has begun.

        Raises:
            ArtefactError: the record is damaged.
            OSError: a file cannot be read.
        """
        record = durable.read_json(self.corpora)
        if not all(isinstance(entry, dict) for entry in record.values()):
            raise durable.damaged(self.corpora, "an entry is no object")
        # Runs of earlier releases recorded no folder: a corpus had one.
        return {name: str(entry.get("folder", name)) for name, entry in record.items()}

    def corpus(self, name: str) -> Path:
        """Returns the folder of the corpus `name` that the run trains on.

        Raises:
            ArtefactError: the record of the run is damaged.
        """
        return self.work.corpus(self.corpus_folders().get(name, name))

    @property
    def reference(self) -> Path:
        """Log-probabilities of all rankings under the model that stage `preference` starts from."""
        return self.path / "reference.safetensors"

    @property
    def tokenizer_model(self) -> Path:
        """The tokenizer of an imported model, else that of the work directory."""
        imported = tokenizer_in(self.path / "tokenizer")
        return imported if imported.is_file() else self.work.tokenizer_model

    @property
    def chat_template(self) -> Path:
        """The chat template that came with an imported model."""
        return self.path / "chat_template.jinja"

    @property
    def metrics(self) -> Path:
        """Metrics file, one JSON object a line: `step`, `time`, and that step's metrics."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The success marker: written last, and only if the run is complete."""
        return self.path / "result.json"

    @property
    def launch_lock(self) -> Path:
        """Lock held by the launcher of the run."""
        return self.path / ".launch.lock"

    @property
    def rank_lock(self) -> Path:
        """Lock held by rank 0, with or without a launcher."""
        return self.path / ".ranks.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def averages(self) -> Path:
        """Checkpoints of averaged weights, without an optimizer (`dist-lm checkpoint average`)."""
        return self.path / "averages"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        """Returns the file with the output of rank `rank`, all attempts."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def warnings(self) -> Path:
        """Warnings of rank 0, one per line, all attempts; the launcher shows them."""
        return self.logs / "warnings.log"

    def rank_failure(self, rank: int) -> Path:
        """JSON of the exception that ended rank `rank`: `{rank, node, time, type, message, traceback, user_error}`."""
        return self.logs / f"failure_{rank:05d}.json"

    def rank_failures(self) -> list[Path]:
        """Returns the existing records of failed ranks."""
        return sorted(self.logs.glob("failure_*.json"))

    def collectives(self, rank: int) -> Path:
        """JSON of the last collectives that rank `rank` had called when the ranks last hung (`flight_recorder.py`)."""
        return self.logs / f"collectives_{rank:05d}.json"

    def node_log(self, node: int) -> Path:
        """Returns the log of torchrun on node `node`, and of its ranks until they open their own logs."""
        return self.logs / f"node_{node:05d}.log"

    @property
    def links(self) -> Path:
        """JSON of the first all-reduce of the newest attempt: `{ranks, bytes, seconds, bus_gb_per_s}`."""
        return self.logs / "links.json"

    @property
    def events(self) -> Path:
        """Events, one JSON object a line: attempts started and ended, growth, stops (`cluster/events.py`)."""
        return self.logs / "events.jsonl"

    @property
    def live(self) -> Path:
        """JSON, replaced every few seconds by the launcher: the last heartbeat of every rank."""
        return self.logs / "live.json"

    @property
    def conversations(self) -> Path:
        """The conversations with an environment, a file for the tasks of an iteration."""
        return self.path / "conversations"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def samples_part(self, part: int) -> Path:
        """Answers of stage `generate` to one block of prompts, a JSON object per line; exists once complete."""
        return self.samples / f"part-{part:05d}.jsonl"

    def task_samples(self, task: str, step: int) -> Path:
        """Answers to a task of `stage.eval_tasks` by the weights after `step` steps."""
        return self.samples / "eval" / task / f"step_{step:08d}.jsonl"

    @property
    def evaluations(self) -> Path:
        """Weights that wait until actors evaluate them, one file for each evaluated step."""
        return self.path / "evaluations"

    @property
    def inputs(self) -> Path:
        """JSON of what the run began with: for `generate` the number of prompts and the hashes of their files and of
        the checkpoint, for `evaluate` the hashes of task files, corpora and checkpoints."""
        return self.path / "prompts.json"

    @property
    def noted_files(self) -> Path:
        """JSON with the hashes of the files of `stage.eval_tasks` and of the prompts of stage rlhf, and the version of
        the tests of our own problems."""
        return self.path / "noted_files.json"

    @property
    def profile(self) -> Path:
        """Folder of what ranks record during the steps in `profile.steps`."""
        return self.path / "profile"

    def trace(self, rank: int) -> Path:
        """Chrome trace of the profiled steps of rank `rank`."""
        return self.profile / f"trace_{rank:05d}.json.gz"

    def traces(self) -> dict[int, Path]:
        """Returns the existing traces by rank."""
        return {int(path.name[6:11]): path for path in sorted(self.profile.glob("trace_?????.json.gz"))}

    def memory_snapshot(self, rank: int) -> Path:
        """GPU memory of rank `rank` in the profiled steps, in torch's format (a pickle; no code of ours reads it)."""
        return self.profile / f"memory_{rank:05d}.pickle"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    def note_files(self, files: Mapping[str, Sequence[Path]]) -> None:
        """Adds the SHA-256 of the files of each key (`Config.noted_files`) to `noted_files.json`, over earlier ones.

        Raises:
            ArtefactError: `noted_files.json` is damaged.
            OSError: a file cannot be read or written.
        """
        if hashes := _hashes(files):
            durable.write_sealed(self.noted_files, self._noted() | hashes)

    def note_tests(self, version: int, tasks: Sequence[str]) -> None:
        """Notes the version of the tests of our own problems, unless one is noted: all evaluations of a run use it.

        A run with figures of an earlier release, which noted none, keeps version 1.

        Args:
            tasks: names of the tasks of our own problems.

        Raises:
            ArtefactError: a file is damaged.
            OSError: a file cannot be read.
        """
        noted = self._noted()
        if _TESTS not in noted:
            has_figures = any((self.samples / "eval" / task).exists() for task in tasks)
            durable.write_sealed(self.noted_files, noted | {_TESTS: str(1 if has_figures else version)})

    def tests_version(self, default: int) -> int:
        """Returns the version that `note_tests` has noted; `default` if it has noted none.

        Raises:
            ArtefactError: `noted_files.json` is damaged.
            OSError: a file cannot be read.
        """
        version = str(self._noted().get(_TESTS, default))
        if not version.isdecimal():
            raise ArtefactError(f"{self.noted_files}: not a version of tests ({version!r}): choose another run_id")
        return int(version)

    def require_files(self, files: Mapping[str, Sequence[Path]]) -> None:
        """Refuses files that have changed since the run began. A key that was not noted then passes; all files are
        read.

        Scores of one name would belong to different questions otherwise, or the run would mix two sets of prompts.

        Raises:
            ArtefactError: a file has changed (the message names the key and the way out), or `noted_files.json` is
                damaged.
            OSError: a file cannot be read.
        """
        noted = self._noted()

        for name, sha256 in _hashes(files).items():
            if noted.get(name, sha256) != sha256:
                way_out = "give the new one another name" if name.startswith("eval.") else "choose another run_id"
                raise ArtefactError(f"{name}: has changed since {self.path} began with it: restore it, or {way_out}")

    def _noted(self) -> dict[str, str]:
        return durable.read_json(self.noted_files)

    def create(self) -> None:
        """Creates the directories of the run that do not exist."""
        for directory in (self.path, self.checkpoints, self.logs, self.samples):
            directory.mkdir(parents=True, exist_ok=True)


def _command(path: Path) -> dict[str, Any]:
    """Returns the record of a command as `launcher.pipeline.Pipeline` wrote it.

    Raises:
        ArtefactError: the file is damaged.
    """
    record = durable.read_json(path, _COMMAND_KINDS, "the record of a command")

    for stage in record["stages"]:
        if not (isinstance(stage, dict) and all(isinstance(stage.get(key), str) for key in _STAGE_TEXTS)):
            raise durable.damaged(path, f"stages: {stage}")
        if stage["state"] not in get_args(StageState):
            raise durable.damaged(path, f"state: {stage['state']}")

    if record["state"] not in get_args(CommandState):
        raise durable.damaged(path, f"state: {record['state']}")
    if not all(isinstance(argument, str) for argument in record["command"]):
        raise durable.damaged(path, f"command: {record['command']}")
    return record


def _hashes(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Returns one hexadecimal SHA-256 for each key: that of its file, or of the names and hashes of several files.

    With several files, their order and names count, but not their folders. All files are read.

    Raises:
        OSError: a file cannot be read.
    """
    hash_of = {}
    for name, paths in files.items():
        file_hashes = [[path.name, durable.sha256_of(path)] for path in paths]
        hash_of[name] = hashlib.sha256(json.dumps(file_hashes).encode()).hexdigest()
        # A single file keeps its own hash, which `sha256sum` shows too.
        if len(paths) == 1:
            hash_of[name] = file_hashes[0][1]
    return hash_of
