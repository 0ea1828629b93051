"""What a launch ends with: where everything is, the model beside gzip, a few samples."""

import json

from dist_lm.chat.template import last_request
from dist_lm.config.generate import GenerateRunConfig
from dist_lm.launcher.plan import Plan, PlannedStage, run_of
from dist_lm.launcher.reward_summary import print_agreement, reward_entries
from dist_lm.launcher.rlhf_summary import is_rlhf, print_rlhf
from dist_lm.launcher.tools_summary import print_tools, tool_entries
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.symbols import END
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import change, counted, percent, three_decimals

SAMPLE_LINES = 12


def print_summary(plan: Plan, console: Console) -> None:
    """Sum up the stage asked for: figures, samples, paths, the next command."""
    stage = plan.stages[-1]
    if stage.info.generates:
        print_generation(run_of(stage.config), console)
        return
    if not stage.info.trains:
        console.line(f"{stage.info.name} is there: {stage.config.work_dir}")
        return
    run = run_of(stage.config)
    result = json.loads(run.result.read_text())
    if is_rlhf(result):
        print_rlhf(result, run, console)
        return
    print_compression(result, stage, console)
    print_before_and_after(result, console)
    print_tools(result, console)
    print_agreement(result, console)
    print_samples(run, console)
    console.summary(f"stage={stage.info.name} is done", dict(entries(result, stage, run)))


def print_generation(run: RunDirectory, console: Console) -> None:
    """How many answers there are, and where."""
    result = json.loads(run.result.read_text())
    console.summary(
        "stage=generate is done",
        {
            "answers": f"{result['answers']:,} to {counted(result['prompts'], 'prompt')}, {refused_text(result)}",
            "tokens": f"{result['tokens']:,}, {result['tokens_per_s']:,.0f} a second "
            f"on {counted(result['actors'], 'actor')}",
            "checkpoint": result["checkpoint"],
            "samples": f"{run.samples} ({counted(result['parts'], 'file')})",
        },
    )


def refused_text(result: dict) -> str:
    """How many prompts were refused, and the first reason."""
    first = result.get("first_refusal")
    return f"{result['refused']:,} refused" + (f": {first}" if first else "")


def all_refused(plan: Plan) -> str:
    """What to say where a stage has answered none of its prompts; empty where it has answered one."""
    config = plan.stages[-1].config
    if not isinstance(config, GenerateRunConfig):
        return ""
    result = json.loads(run_of(config).result.read_text(encoding="utf-8"))
    if result["answers"]:
        return ""
    return f"stage.prompts={config.stage.prompts}: no prompt was answered, {refused_text(result)}"


def print_compression(result: dict, stage: PlannedStage, console: Console) -> None:
    """Bits per byte on held-out documents beside `gzip -9` of the same documents one by one."""
    baseline = result["gzip_bits_per_byte"]
    if not baseline:
        return
    names = ["all", *sorted(key for key in baseline if key != "all")]
    rows = []
    for name in names:
        model = result["metrics"][f"val/bits_per_byte{'' if name == 'all' else f'_{name}'}"]
        rows.append((name, f"{model:.3f}", f"{baseline[name]:.3f}", change(model / baseline[name])))
    console.table(
        f"bits per byte on the held-out documents of corpus {stage.config.stage.corpus}",
        ("language", "model", "gzip -9", "model against gzip"),
        rows,
    )


def print_before_and_after(result: dict, console: Console) -> None:
    """Loss on held-out documents before the first step and after the last, where the stage has looked."""
    before, after = result.get("before", {}), result["metrics"]
    names = [name for name in after if name.startswith("val/loss") and name in before]
    if names:
        rows = [
            (
                name.removeprefix("val/loss").removeprefix("_") or "all",
                three_decimals(before[name]),
                three_decimals(after[name]),
                change(after[name] / before[name]),
            )
            for name in names
        ]
        console.table("loss on held-out documents", ("documents", "before", "after", "change"), rows)


def print_samples(run: RunDirectory, console: Console) -> None:
    """The first sample of each language, or of each kind of question."""
    files = sorted(run.samples.glob("step_*.jsonl"))
    shown: set[str] = set()
    for sample in json_lines(files[-1]) if files else ():
        if "kind" in sample:
            if sample["kind"] not in shown:
                shown.add(sample["kind"])
                print_question(sample, console)
        elif sample["language"] not in shown:
            shown.add(sample["language"])
            verdict = {True: ", parses", False: ", does not parse"}.get(sample.get("parses"), "")
            text = (sample["prompt"] + sample["completion"]).splitlines()[:SAMPLE_LINES]
            console.line(f"--- {sample['language']}{verdict}")
            for text_line in text:
                console.line(f"    {text_line}")


def print_question(sample: dict, console: Console) -> None:
    """The last request of the user, and the turn that the model wrote."""
    console.line(f"--- {sample['kind']}, {'right' if sample['right'] else 'wrong'}")
    console.line(f"    {last_request(sample['prompt']).strip()}")
    for line in sample["found"].removesuffix(END).splitlines():
        console.line(f"    {line}")


def entries(result: dict, stage: PlannedStage, run: RunDirectory) -> list[tuple[str, str]]:
    """(what, where or how much)."""
    metrics = result["metrics"]
    bits = f", {metrics['val/bits_per_byte']:.3f} bits per byte" if "val/bits_per_byte" in metrics else ""
    unit, kind = ("tokens", "conversations") if bits else ("choices", "rankings")
    lines = [
        ("parameters", f"{result['parameters']:,}"),
        ("trained", f"{result['steps']:,} steps, {result['tokens']:,} {unit} on {counted(result['ranks'], 'rank')}"),
        ("val", f"loss {three_decimals(metrics['val/loss'])}{bits}"),
    ]
    if packing := result.get("packing"):
        everything = packing["documents"] + packing["left_out"]
        left_out = f", {packing['left_out']:,} of {everything:,} too long for one" if packing["left_out"] else ""
        lines.append(
            (
                "packed",
                f"{packing['documents']:,} {kind} into {packing['sequences']:,} sequences, "
                f"{percent(packing['padding'])} padding{left_out}",
            )
        )
    lines += tool_entries(metrics) + reward_entries(result)
    parsed = [
        f"{key.removeprefix('code/parses_')} {percent(value)}"
        for key, value in sorted(metrics.items())
        if key.startswith("code/parses_")
    ]
    if parsed:
        lines.append(("samples that parse", ", ".join(parsed)))
    lines += [
        ("checkpoint", str(run.checkpoints / str(result["checkpoint"]))),
        ("samples", str(run.samples)),
        ("metrics", str(run.metrics)),
        ("rank logs", str(run.logs)),
    ]
    if stage.config.tracking.name == "wandb":
        lines.append(("wandb", str(run.wandb)))
    lines.append(("corpus", f"dist-lm data inspect {run.work.corpus(stage.config.stage.corpus)}"))
    return lines
