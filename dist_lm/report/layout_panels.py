"""A panel for each layout that runs had: what runs share is drawn once. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import parameter_count
from dist_lm.parallel.layout import Layout
from dist_lm.report.facts import RunFacts
from dist_lm.report.layout_picture import (
    MOST_RANKS,
    MOST_REPLICAS,
    facts_of,
    held_elements,
    kinds,
    mesh_picture,
    parameter_picture,
)
from dist_lm.report.rank_memory import ELEMENT_BYTES, RankMemory, rank_memory
from dist_lm.tracking.readable import counted, readable_count


@dataclass(frozen=True)
class DrawnKind:
    """How one kind of parameter is cut."""

    name: str
    picture: Markup
    facts: dict[str, str]


@dataclass(frozen=True)
class Panel:
    """One layout of one model."""

    label: str
    words: str
    mesh: Markup
    kinds: tuple[DrawnKind, ...]
    memory: RankMemory


def panels(runs: Sequence[RunFacts]) -> list[Panel]:
    """A panel for every layout that is known, with the runs that had it."""
    together: dict[tuple, list[RunFacts]] = {}
    for run in runs:
        if run.model and run.layout:
            hosts = tuple(str(node.get("host")) for node in run.attempt.get("nodes", []))
            together.setdefault((str(run.model), run.layout, hosts), []).append(run)
    return [_panel(members) for members in together.values()]


def _panel(runs: Sequence[RunFacts]) -> Panel:
    model, layout = runs[0].model, runs[0].layout
    assert model
    assert layout
    drawn = [
        DrawnKind(kind.name, parameter_picture(kind, layout), facts_of(kind, layout, ELEMENT_BYTES))
        for kind in kinds(model, layout)
    ]
    labels = ", ".join(run.label for run in runs)
    mesh = mesh_picture(layout, runs[0].attempt)
    return Panel(labels, _words(model, layout), mesh, tuple(drawn), rank_memory(model, layout, runs))


def _words(model: ModelConfig, layout: Layout) -> str:
    total, held = parameter_count(model), held_elements(model, layout)
    parts = [
        f"{layout} on {counted(layout.world_size, 'rank')}.",
        f"Of {readable_count(total)} parameters a rank holds {readable_count(held)}.",
    ]
    if layout.dp_replicate > 1:
        parts.append(f"Each of the {layout.dp_replicate} replicas holds the whole model.")
    if layout.dp_shard * layout.tp > MOST_RANKS or layout.dp_replicate > MOST_REPLICAS:
        parts.append("Not every rank is drawn; the others go on alike.")
    parts.append(
        "A column is a shard (dp_shard), a row a tensor-parallel rank, a colour a node."
        if layout.world_size > 1
        else ""
    )
    return " ".join(part for part in parts if part)
