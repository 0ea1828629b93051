"""The model card of an export (https://huggingface.co/docs/hub/model-cards), from what the run directory says."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_lm.config.model import ModelConfig
from dist_lm.config.phases import phased_corpora
from dist_lm.config.root import WAY_OUT, read_groups
from dist_lm.data.inspect import licences_of
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.errors import ArtefactError
from dist_lm.interop.architectures import Architecture
from dist_lm.model.size import parameter_count
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import read_metrics
from dist_lm.training import checkpoint_files as files

RECORD, CARD = "export.json", "README.md"  # files of an export: what it was made from, and its card
NOT_GIVEN = "not given"
SHOWN = ("val/", "eval/", "code/", "tools/", "preference/", "reward/", "rlhf/")  # groups of metrics


def model_card(
    checkpoint: Path,
    model: ModelConfig,
    architecture: Architecture,
    run: RunDirectory | None,
    dtype: str,
    adapters: bool = False,
) -> str:
    """Returns the content of README.md: model, training, data with licences, evaluation, limits.

    Args:
        run: the run of the checkpoint; None if it lies outside a run, and the card has less.
        dtype: of the exported weights, for the text.
        adapters: the folder holds adapters for peft, not a whole model.

    Raises:
        ArtefactError: the state of the checkpoint, or the configuration or the metrics of the run, are damaged.
        OSError: a file cannot be read.
    """
    state, _ = files.read_state(checkpoint)
    config = _config(run)
    stage = config.get("stage", {})
    name = "/".join(run.path.parts[-2:]) if run else checkpoint.name
    licences, data = _data(run, stage)

    lines = [
        "---",
        f"library_name: {'peft' if adapters else 'transformers'}",
        f"pipeline_tag: {'text-generation' if model.head == 'tokens' else 'text-classification'}",
        "---",
        f"# {name}",
        "",
        f"{architecture.name}, {parameter_count(model):,} parameters, weights in {dtype}, at most "
        f"{model.max_seq_len:,} tokens.",
        f"Exported by dist_lm from {checkpoint.name}.",
        "",
        "## Training",
        "",
        f"- Steps of the last stage: {state.step:,}; its tokens: {state.tokens:,}",
    ]

    # The origin of the weights.
    if stage.get("init_from", "none") != "none":
        lines.append(f"- Started from: {'/'.join(Path(stage['init_from']).parts[-3:])}")
    if record := files.read_adapters(checkpoint):
        base, lora = "/".join(Path(record["base"]).parts[-4:]), record["lora"]
        where = "these adapters change that model" if adapters else "merged into the weights"
        if lora.get("load_in_4bit"):
            base += ", whose blocks were in four bits (NF4)"
        kind = "rsLoRA" if lora.get("rslora") else "LoRA"
        lines.append(f"- {kind} of rank {lora['rank']}, alpha {lora['alpha']:g}, over {base}: {where}")
    if stage.get("branch_from"):
        lines.append(f"- Continues: {'/'.join(Path(stage['branch_from']).parts[-3:])}")
    if imported := config.get("imported"):
        lines.append(f"- Imported from: {imported.get('source', NOT_GIVEN)}; not trained further")

    evaluation = _evaluation(run, state.step, checkpoint)
    lines += ["", "## Data", "", *data, "", "## Evaluation", "", *evaluation, "", "## Limits", ""]
    lines += [f"- {limit}" for limit in _limits(model, licences)]
    if architecture.family == "Qwen2":
        lines.append(
            "- `AutoTokenizer` of transformers 5 splits text as Qwen2's own tokenizer, whatever tokenizer.json says. "
            "The ids of training come from `PreTrainedTokenizerFast.from_pretrained`."
        )
    return "\n".join(lines) + "\n"


def _config(run: RunDirectory | None) -> Mapping[str, Any]:
    """Returns the configuration of a run; empty without one.

    Raises:
        ArtefactError: it cannot be read, or a value that the card shows has another type.
    """
    if run is None:
        return {}
    config = read_groups(run.config)
    stage, imported = config.get("stage", {}), config.get("imported", {})

    # The card takes a run of any version, so its values are not checked as those of a schema.
    texts = {f"stage.{key}": stage.get(key) or "" for key in ("init_from", "branch_from", "corpus")}
    texts["imported.source"] = imported.get("source", "")
    wrong = [key for key, value in texts.items() if not isinstance(value, str)]
    if not isinstance(stage.get("mix") or {}, dict):
        wrong.append("stage.mix")
    phases = stage.get("phases") or []
    has_form = isinstance(phases, list) and all(
        isinstance(phase, dict) and isinstance(phase.get("mix"), dict) for phase in phases
    )
    if not has_form:
        wrong.append("stage.phases")
    if wrong:
        raise ArtefactError(f"{run.config}: not the configuration of a run ({wrong[0]}): {WAY_OUT}")
    return config


def _data(run: RunDirectory | None, stage: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    """Returns the licences of the documents, and a table of the corpora of the last stage, as lines.

    A corpus that is gone or damaged gets a row that says so.
    """
    names = [stage.get("corpus") or "", *(stage.get("mix") or {}), *phased_corpora(stage.get("phases") or ())]

    rows: list[str] = []
    all_licences = set[str]()
    for name in dict.fromkeys(name for name in names if name and run):
        assert run is not None
        folder = run.corpus(name)
        # A checkpoint is exported without its corpora too, which may be on another machine.
        if not manifest_path(folder).is_file():
            rows.append(f"| {name} | | | the corpus is no longer there |")
            continue
        try:
            manifest = read_manifest(folder)
            documents_by_licence = licences_of(folder, manifest)
        except ArtefactError as error:
            rows.append(f"| {name} | | | {error} |")
            continue

        licences = Counter({licence or NOT_GIVEN: count for licence, count in documents_by_licence.items()})
        # The limits of the card name documents without a licence.
        all_licences |= licences.keys()
        train = manifest.splits["train"].counts
        listed = ", ".join(f"{licence} ({count:,})" for licence, count in licences.most_common())
        rows.append(f"| {name} | {train.documents:,} | {train.tokens:,} | {listed} |")

    if not rows:
        return all_licences, ["The run names no corpus."]
    return all_licences, ["| corpus | documents | tokens | licences (documents) |", "| --- | --- | --- | --- |", *rows]


def _evaluation(run: RunDirectory | None, step: int, checkpoint: Path) -> list[str]:
    """Returns lines with the last value of each figure on held-out data (`SHOWN`) up to the step of the checkpoint.

    Averaged weights have metrics of their own. Without metrics it is one sentence.

    Raises:
        ArtefactError: the metrics are damaged.
    """
    metrics: dict[str, Any] = {}
    if (checkpoint / files.AVERAGE).is_file():
        metrics = durable.read_json(checkpoint / files.AVERAGE, {"metrics": dict})["metrics"]
    elif run is None or not run.metrics.is_file():
        return ["The run has no metrics."]
    else:
        for line in read_metrics(run.metrics):
            if line["step"] <= step:
                metrics |= line

    rows = [
        f"| {name} | {figure:.4g} |"
        for name, figure in sorted(metrics.items())
        if name.startswith(SHOWN) and isinstance(figure, int | float)
    ]
    if not rows:
        return ["The run has no evaluation."]
    return ["| metric, held-out data | value |", "| --- | --- |", *rows]


def _limits(model: ModelConfig, licences: set[str]) -> list[str]:
    """Returns the sentences on what the model must not be trusted with, by its head and the licences of its data."""
    if model.head == "scalar":
        meaning = "Scores order completions of one prompt; they have no unit, and differ from dist_lm's by a constant."
        limits = [meaning, "A score is read at the last token, which in training was the end of the assistant's turn."]
    else:
        limits = ["The model may write text that is false, unsafe or a copy of its data. Code it writes may not run."]
    if NOT_GIVEN in licences:
        limits.append("Some documents come without a licence.")
    return limits
