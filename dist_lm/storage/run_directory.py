"""Every path under the work directory, and the only code that knows their names.

work/
  tokenizer/{tokenizer.model,report.json}
  corpora/NAME/{train,val}-000000.tar + .index, manifest.json
  runs/STAGE/RUN_ID/
    config.yaml metrics.jsonl result.json
    checkpoints/step_00000100/ ... LATEST BEST
    logs/rank_00000.log   samples/   wandb/
  runs/generate/RUN_ID/
    config.yaml prompts.json metrics.jsonl samples/part-00000.jsonl ... wandb/ result.json
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkDirectory:
    """What all runs share: the tokenizer, the corpora, and where runs are kept."""

    path: Path

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def tokenizer_model(self) -> Path:
        return self.tokenizer / "tokenizer.model"

    @property
    def tokenizer_report(self) -> Path:
        return self.tokenizer / "report.json"

    @property
    def build_lock(self) -> Path:
        """Held by the command that builds tokenizer or corpora."""
        return self.path / ".build.lock"

    def corpus(self, name: str) -> Path:
        return self.path / "corpora" / name

    def corpus_manifest(self, name: str) -> Path:
        return self.corpus(name) / "manifest.json"

    def pipeline(self, stage: str, run_id: str) -> Path:
        """JSON: how the last command that asked for `stage` under `run_id` stands, stage by stage."""
        return self.path / "pipelines" / f"{stage}-{run_id}.json"

    def pipeline_lock(self, name: str) -> Path:
        """Held by the command whose `pipeline` file has this name."""
        return self.path / "pipelines" / f".{name}.lock"

    def pipelines(self) -> list[Path]:
        """The pipelines that are there, the one written last at the end."""
        return sorted((self.path / "pipelines").glob("*.json"), key=lambda path: path.stat().st_mtime)

    def runs(self, stage: str) -> list["RunDirectory"]:
        """The runs of a stage that are there, by name."""
        return [RunDirectory(path) for path in sorted((self.path / "runs" / stage).glob("[!.]*")) if path.is_dir()]

    def run(self, stage: str, run_id: str) -> "RunDirectory":
        return RunDirectory(self.path / "runs" / stage / run_id)


@dataclass(frozen=True)
class RunDirectory:
    """One run of one training stage."""

    path: Path

    @property
    def work(self) -> WorkDirectory:
        """The work directory this run lies in (`work/runs/STAGE/RUN_ID`)."""
        return WorkDirectory(self.path.parents[2])

    @property
    def config(self) -> Path:
        """The resolved configuration, read by every rank."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: `step`, `time`, and that step's metrics."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The success marker: written last, only at a true end."""
        return self.path / "result.json"

    @property
    def launch_lock(self) -> Path:
        """Held by the launcher that runs it."""
        return self.path / ".launch.lock"

    @property
    def rank_lock(self) -> Path:
        """Held by rank 0, whoever started it."""
        return self.path / ".ranks.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        """Everything rank `rank` printed, all attempts."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def warnings(self) -> Path:
        """What the first rank warned of, a line each, all attempts: the launcher shows it."""
        return self.logs / "warnings.log"

    def rank_failure(self, rank: int) -> Path:
        """JSON of the exception that ended rank `rank`: `{rank, node, time, type, message, traceback, user_error}`."""
        return self.logs / f"failure_{rank:05d}.json"

    def rank_failures(self) -> list[Path]:
        """The records of failed ranks that are there."""
        return sorted(self.logs.glob("failure_*.json"))

    def node_log(self, node: int) -> Path:
        """What torchrun itself printed on node `node`, and ranks before they had a log of their own."""
        return self.logs / f"node_{node:05d}.log"

    @property
    def links(self) -> Path:
        """JSON of the first all-reduce of the newest attempt: `{ranks, bytes, seconds, bus_gb_per_s}`."""
        return self.logs / "links.json"

    @property
    def events(self) -> Path:
        """One JSON object a line: attempts started and ended, growth, stops (`cluster/journal.py`)."""
        return self.logs / "events.jsonl"

    @property
    def live(self) -> Path:
        """JSON, written anew every few seconds by the launcher: nodes, ranks, and what they were last heard doing."""
        return self.logs / "live.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def samples_part(self, part: int) -> Path:
        """What stage `generate` made of one block of prompts, a JSON object a line; it is there when it is whole."""
        return self.samples / f"part-{part:05d}.jsonl"

    @property
    def prompts(self) -> Path:
        """Prompts that stage `generate` fetched from a server."""
        return self.path / "prompts"

    @property
    def inputs(self) -> Path:
        """JSON: how many prompts stage `generate` began with, and the hashes of their files."""
        return self.path / "prompts.json"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    def create(self) -> None:
        """Make the directories of the run; existing ones are kept."""
        for directory in (self.path, self.checkpoints, self.logs, self.samples):
            directory.mkdir(parents=True, exist_ok=True)
