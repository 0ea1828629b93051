"""What the stub of wandb's server holds: runs and versions of artifacts."""

import json
from dataclasses import dataclass, field
from typing import Any

HISTORY, EVENTS, SUMMARY, OUTPUT = "wandb-history.jsonl", "wandb-events.jsonl", "wandb-summary.json", "output.log"


@dataclass
class StubRun:
    """What the server holds of one run."""

    entity: str
    project: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # of every UpsertBucket, the newest value of each
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # by file, by number of the line
    complete: bool = False
    exit_code: int | None = None
    alerts: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def line_count(self, file: str) -> int:
        """One more than the highest number of a line."""
        return max(self.lines.get(file, {}), default=-1) + 1

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The lines of a file of JSON lines, in order."""
        return [json.loads(line) for _, line in sorted(self.lines.get(file, {}).items())]

    def history(self) -> list[dict[str, Any]]:
        """Every row of metrics, `_step` included; a row that was sent twice is there twice."""
        return self.rows(HISTORY)

    def steps(self) -> dict[int, dict[str, Any]]:
        """Metrics by step, without wandb's own; later rows of a step add to earlier ones."""
        found: dict[int, dict[str, Any]] = {}
        for row in self.history():
            metrics = {name: value for name, value in row.items() if not name.startswith("_")}
            found.setdefault(row["_step"], {}).update(metrics)
        return found

    def summary(self) -> dict[str, Any]:
        """The newest summary."""
        rows = self.rows(SUMMARY)
        return rows[-1] if rows else {}

    def config(self) -> dict[str, Any]:
        """The configuration as the client sees it."""
        config = json.loads(self.settings.get("config") or "{}")
        return {name: item["value"] for name, item in config.items() if name != "_wandb"}

    @property
    def id(self) -> str:
        return f"run-{self.name}"


@dataclass
class StubArtifact:
    """One version of an artifact."""

    id: str
    input: dict[str, Any]  # of CreateArtifact
    manifest: dict[str, Any] | None = None
    committed: bool = False

    @property
    def name(self) -> str:
        return self.input["artifactCollectionName"]


def resumed(run: StubRun) -> dict[str, Any]:
    """What a client is told that takes a run up again."""

    def tail(file: str) -> str:
        return json.dumps([line for _, line in sorted(run.lines.get(file, {}).items())][-1:])

    started = json.loads(run.settings.get("config") or "{}").get("_wandb", {}).get("value", {}).get("t")
    return {
        "id": run.id,
        "name": run.name,
        "summaryMetrics": json.dumps(run.summary()),
        "displayName": run.settings.get("displayName"),
        "logLineCount": run.line_count(OUTPUT),
        "historyLineCount": run.line_count(HISTORY),
        "eventsLineCount": run.line_count(EVENTS),
        "historyTail": tail(HISTORY),
        "eventsTail": tail(EVENTS),
        "config": run.settings.get("config") or "{}",
        "tags": run.settings.get("tags") or [],
        "notes": None,
        "wandbConfig": json.dumps({"t": started}) if started else None,
    }
