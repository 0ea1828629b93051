"""`python -m dist_lm report`: one HTML file that loads nothing and runs no script but ours."""

import base64
import hashlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dist_lm.errors import ArtefactError
from dist_lm.report.charts import Chart, as_data, charts_of, readable_title, still_values
from dist_lm.report.conditions import differences, flat, from_defaults, hardware_of
from dist_lm.report.conversation_page import ShownConversation, shown_conversation
from dist_lm.report.conversations import IterationConversations
from dist_lm.report.facts import Facts, RunFacts
from dist_lm.report.layout import panels
from dist_lm.report.mixture import corpus_rows, mixtures, tokenizer_words
from dist_lm.report.overview import card_of, sample_of, scores_of
from dist_lm.report.read import read_facts, require_paths
from dist_lm.report.timeline import timeline_of
from dist_lm.storage import durable
from dist_lm.tracking.readable import counted, four_digits

FILE = "report.html"
HERE = Path(__file__).parent
SAMPLES = 80  # most samples of all runs of a report


def write_report(paths: Sequence[Path], output: Path | None, run_id: str | None) -> tuple[Path, int]:
    """Writes the report of `paths`; an earlier file is replaced.

    Args:
        paths: as `read.read_facts` takes them, at least one.
        output: the file; None: `report.html` in the directory of `paths` if it is the only one, else in the current
            directory.
        run_id: the run_id of a command in a work directory; None: the newest command that has runs.

    Returns:
        The file and its size in bytes.

    Raises:
        ArtefactError: nothing to report on, a file of a run is damaged, or the directory of the output does not exist.
        ConfigError: the module of a stage cannot be loaded.
        OSError: the file cannot be written.
    """
    # A wrong path must be refused before long files are read.
    require_paths(paths, run_id)
    output = output or (paths[0] / FILE if len(paths) == 1 else Path(FILE))
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ArtefactError(f"--output {output}: give a file in an existing directory, such as {FILE}")

    page = render(read_facts(paths, run_id), created_at=time.strftime("%Y-%m-%d %H:%M"))
    durable.write_text(output, page)
    return output, output.stat().st_size


def render(facts: Facts, created_at: str) -> str:
    """Returns the page as HTML, which loads nothing; all text of runs is escaped. It reads files of this package alone.

    Args:
        created_at: date and time of the report, for people.

    Raises:
        ConfigError: the module of a stage cannot be loaded.
    """
    by_stage = facts.by_stage()
    samples_per_run = max(2, SAMPLES // max(1, len(facts.runs)))
    stages = charts_of(by_stage, facts.runs)

    style = _inline("vendor/uPlot.min.css") + _inline("page.css")
    library, script = _inline("vendor/uPlot.iife.min.js"), _inline("page.js")

    # Text of a run may be hostile: everything is escaped, and a missing name is an error.
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}

    return environment.get_template("page.html.jinja").render(
        facts=facts,
        created_at=created_at,
        policy=policy(style, [library, script]),
        style=style,
        library=library,
        script=script,
        data=as_data(stages, facts.runs),
        sections=_sections(list(by_stage)),
        stages=stages,
        cards=[card_of(run) for run in facts.runs],
        stage_samples={
            stage: [
                (run, [sample_of(row) for row in run.samples.rows[:samples_per_run]])
                for run in runs
                if run.samples.rows
            ]
            for stage, runs in by_stage.items()
        },
        stage_conversations={
            stage: [(run, shown_iterations(run)) for run in runs if run.conversations]
            for stage, runs in by_stage.items()
        },
        stage_scores={
            stage: [(run, scores) for run in runs if (scores := scores_of(run))] for stage, runs in by_stage.items()
        },
        pictures=panels(facts.runs),
        mixtures=mixtures(facts.runs, facts.works),
        corpus_rows=corpus_rows,
        tokenizer_words=tokenizer_words,
        timeline=timeline_of(facts.runs),
        hardware=hardware_of(facts.runs),
        differences=differences([run.config for run in facts.runs]),
        configurations=[(run, from_defaults(run.config), flat(run.config)) for run in facts.runs],
        notes=notes_of,
        readable_title=readable_title,
        still_values=still_values,
        counted=counted,
        four_digits=four_digits,
        quoted=shlex.quote,
    )


def shown_iterations(run: RunFacts) -> list[tuple[IterationConversations, list[ShownConversation]]]:
    """Returns the iterations of a run whose conversations were read, each with those that are shown."""
    return [(of, [shown_conversation(chosen) for chosen in of.chosen]) for of in run.conversations]


def notes_of(chart: Chart) -> list[tuple[str, str]]:
    """Returns the notes below a chart as (class in the style sheet, text), none to two: on values that are not drawn
    (of the longest curve), and, as a warning, on the number of values that are not finite."""
    notes = []

    # A reader must know that a curve does not show every measured value.
    thinned = [line.curve for line in chart.lines if len(line.curve.points.steps) < line.curve.measured]
    if thinned:
        longest = max(thinned, key=lambda curve: curve.measured)
        text = (
            f"{longest.measured:,} measured values, {len(longest.points.steps):,} drawn: "
            "smallest and largest of each stretch of steps"
        )
        notes.append(("note", text))

    not_finite = sum(line.curve.not_finite for line in chart.lines)
    if not_finite:
        notes.append(("note warning", f"{counted(not_finite, 'value')} not finite: gaps in the curve"))

    return notes


def policy(style: str, scripts: Sequence[str]) -> str:
    """Returns a Content-Security-Policy that allows only the scripts of the page, and neither loading nor sending."""
    allowed = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inline(name: str) -> Markup:
    """Returns a file of this package for inclusion in the page without escaping."""
    text = (HERE / name).read_text(encoding="utf-8")
    # Such text would end its element early.
    assert not any(end in text for end in ("</script", "</style")), name
    return Markup(text)  # noqa: S704


def _sections(stages: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (id, heading) of the sections of a page, in their order: the overview, one for each stage, those of all
    runs."""
    return [
        ("overview", "Overview"),
        *((f"stage-{stage}", stage) for stage in stages),
        ("layout", "Layout"),
        ("data", "Data"),
        ("timeline", "Timeline"),
        ("hardware", "Hardware"),
        ("configuration", "Configuration"),
    ]
