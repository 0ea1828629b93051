"""What a run of stage `rlhf` shows: a line of metrics an iteration, and rollouts to read."""

import json
import time
from dataclasses import dataclass, field

from dist_lm.config.rlhf_run import RlhfRunConfig
from dist_lm.evaluation.tool_questions import shown
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.learner import IterationReport
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import Heartbeat, Phase
from dist_lm.training.step_meter import Eta
from dist_lm.training.trainer import is_due, peak_memory_gib


@dataclass
class Reporter:
    """Told of every iteration, on every rank; it writes on the first one."""

    config: RlhfRunConfig
    run: RunDirectory
    world: World
    tokenizer: Tokenizer
    metrics: MetricsWriter | None  # on the first rank
    heartbeat: Heartbeat
    tokens: int  # drawn and trained on so far
    iteration: int  # done
    _since: float = field(default_factory=time.perf_counter)
    _eta: Eta = field(init=False)

    def __post_init__(self) -> None:
        self._eta = Eta(self.config.stage.steps)

    def __call__(self, report: IterationReport) -> None:
        """One more iteration is done."""
        new = int(report.rollouts.new_tokens_B.sum())
        self.tokens += new
        self.iteration = report.iteration
        now = time.perf_counter()
        took, self._since = now - self._since, now
        line = dict(report.metrics) | {
            "train/tokens": self.tokens,
            "perf/step_s": took,
            "perf/tokens_per_s": new / took,
            "perf/tokens_per_s_per_rank": new / took / self.world.size,
            "perf/samples_per_s": len(report.rollouts) / took,
            "perf/memory_gib": peak_memory_gib(self.world.device),
        }
        left_s = self._eta.after(report.iteration)
        if left_s is not None:
            line["perf/eta_s"] = left_s
        last = report.iteration == self.config.stage.steps
        shown = last or is_due(report.iteration, self.config.stage.eval_every)
        if self.metrics and (shown or report.iteration % self.config.stage.log_every == 0):
            self.metrics.write(report.iteration, line)
        if self.metrics and shown and self.config.rlhf.table_rollouts:
            self._write_table(report)
        self.alive(Phase.DATA)

    def alive(self, phase: Phase) -> None:
        """Say that work gets on."""
        self.heartbeat.beat(phase, self.iteration)

    def _write_table(self, report: IterationReport) -> None:
        """`samples/step_N.jsonl`: rollouts from the best to the worst, evenly chosen, with what each part gave."""
        n = len(report.score_B)
        wanted = min(n, self.config.rlhf.table_rollouts)
        order = report.score_B.argsort(descending=True, stable=True).tolist()
        chosen = {order[i * (n - 1) // max(1, wanted - 1)] for i in range(wanted)}
        lines = []
        for place, rollout in enumerate(report.rollouts):
            if place in chosen:
                line = {
                    "kind": "rollout",
                    "prompt": shown(rollout.prompt, self.tokenizer),
                    "completion": shown(rollout.completion, self.tokenizer),
                    "reward": float(report.score_B[place]),
                    "parts": {name: float(score_B[place]) for name, score_B in report.part_B.items()},
                    "tokens": len(rollout.completion),
                    "finish": rollout.finish,
                    "version": rollout.version,
                }
                lines.append((line["reward"], place, json.dumps(line, ensure_ascii=False)))
        lines.sort(key=lambda line: (-line[0], line[1]))
        path = self.run.samples / f"step_{report.iteration:08d}.jsonl"
        durable.write_text(path, "".join(f"{text}\n" for _, _, text in lines))
