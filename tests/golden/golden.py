"""Golden runs: a work directory made by an earlier commit, which the present code must continue and read alike.

    python tests/golden/golden.py make CHECKOUT FOLDER [PART ...]    CHECKOUT: a clone of that commit; FOLDER is made
    python tests/golden/golden.py check FOLDER [PART ...]

`make` runs the quick start of CHECKOUT into FOLDER/work, then every other stage, LoRA, GRPO, and runs that USR1 stops
in their middle. Then it looks at copies of this directory with the code of CHECKOUT, and writes hashes and figures to
FOLDER/expected/PART.json. `check` does the same with the code around this file and compares. The parts:

    finished   every finished stage is "there", and no file of its run changes
    resume     each stopped run ends with the same tensors and metrics
    outputs    the same greedy answers, scores, exported files and import; the report builds
    fresh      tokenizer, shards and a few steps of stages language and code from nothing

Tensors are compared bit by bit, so both commands must run on the same kind of CPU with the same torch. An interrupted
`make` continues. tests/golden/expected.json has the hashes that commit 805e6f6 gave: where `make` runs with it on the
same kind of CPU, it must give the same ones.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]
COMMITTED = Path(__file__).with_name("expected.json")
SIZE = ("model=nano",)
PROMPTS = ("def add(a, b):\n", "import os\n\n\ndef ", "#!/bin/bash\n# Print ", "SELECT name FROM users WHERE ", "The ")
GREEDY = ("stage.temperature=0", "stage.max_new_tokens=48")

# Overrides of each launch. {work} is FOLDER/work, also where a copy of it is looked at: it is only read then.
FINISHED = {
    "rlhf": ("stage=rlhf",),
    "preference": ("stage=preference",),
    "lora": (
        *("stage=code", "run_id=lora", "stage.init_from={work}/runs/code/default", "stage.lora.rank=4"),
        *("stage.lr=1e-3", "stage.steps=12", "stage.warmup_steps=2"),
    ),
    "grpo": (
        *("stage=rlhf", "run_id=grpo", "stage.init_from={work}/runs/tools/default", "stage.steps=3"),
        *("rlhf.algorithm=grpo", "rlhf.prompts=4", "rlhf.samples=4", "rlhf.held_out_prompts=8"),
        *("rlhf.reward_model=none", "rlhf.rewards={{size: {{kind: length, target: 20}}, solved: {{kind: tests}}}}"),
        *("rlhf.prompts_from={folder}/ladder/train.jsonl", "rlhf.held_out_from={folder}/ladder/held_out.jsonl"),
    ),
}
OUTPUTS = {
    "generate": (
        *("stage=generate", "stage.prompts={folder}/prompts.jsonl", "stage.checkpoint={work}/runs/code/default"),
        *GREEDY,
    ),
    "generate_chat": (
        *("stage=generate", "run_id=chat", "stage.prompts={folder}/prompts.jsonl", "stage.chat=true"),
        *("stage.checkpoint={work}/runs/rlhf/default", *GREEDY),
    ),
    "generate_lora": (
        *("stage=generate", "run_id=lora", "stage.prompts={folder}/prompts.jsonl"),
        *("stage.checkpoint={work}/runs/code/lora", *GREEDY),
    ),
    "evaluate": (
        *("stage=evaluate", "stage.models=[{work}/runs/code/default,{work}/runs/preference/default]"),
        *("stage.tasks=[own_python,own_sql,bits_per_byte]", "stage.max_new_tokens=64", "stage.documents=20"),
    ),
    "export": ("stage=export", "stage.run=code", "stage.folder={scratch}/exports/code"),
    "export_lora": (
        *("stage=export", "run_id=lora", "stage.init_from={work}/runs/code/lora"),
        "stage.folder={scratch}/exports/lora",
    ),
    "import": ("stage=import", "stage.init_from=hf:{scratch}/exports/code", "run_id=code"),
}
# the step after which USR1 comes, and the launch
STOPPED = {
    "language": (12, ("stage=language", "stage.steps=40", "stage.warmup_steps=6")),
    "code": (
        12,
        ("stage=code", "stage.init_from={work}/runs/language/default", "stage.steps=40", "stage.warmup_steps=6"),
    ),
    "tools": (8, ("stage=tools", "stage.init_from={work}/runs/code/default", "stage.steps=24")),
    "reward": (8, ("stage=reward", "stage.init_from={work}/runs/tools/default", "stage.steps=24")),
    "preference": (8, ("stage=preference", "stage.init_from={work}/runs/tools/default", "stage.steps=24")),
    "rlhf": (
        2,
        (
            *("stage=rlhf", "stage.init_from={work}/runs/tools/default", "stage.steps=6"),
            "rlhf.reward_model={work}/runs/reward/default",
        ),
    ),
}
FRESH = (
    *("stage=code", "stage.steps=10", "stage.warmup_steps=2", "stages.language.steps=20"),
    "stages.language.warmup_steps=2",
)
USR1_EXIT = 138
# Measurements of time, memory and processes are no result.
MEASURED = ("perf/", "timing/", "checkpoint/", "time", "rollout/tokens_per_s", "system/")


class Golden:
    """The folder of a golden work directory, and the code that looks at it."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder.resolve(), checkout.resolve()
        self.work = self.folder / "work"
        self.environment = {**os.environ, "PYTHONPATH": str(self.checkout), "DIST_LM_VENV": sys.prefix}

    def overrides(self, texts: Sequence[str], work: Path) -> list[str]:
        """The command line of a launch that writes to `work`."""
        paths = {"work": self.work, "folder": self.folder, "scratch": work.parent}
        return [f"work_dir={work}", *SIZE, *(text.format(**paths) for text in texts)]

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *command: str, log: Path) -> str:
        """Run a module of `checkout` and return what it printed.

        Raises:
            RuntimeError: it failed.
        """
        code = self.start(*command, log=log).wait()
        output = log.read_text(encoding="utf-8", errors="replace")
        if code:
            raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{output[-3000:]}")
        return output

    def launch(self, texts: Sequence[str], work: Path) -> str:
        overrides = self.overrides(texts, work)
        stage = overrides[len(SIZE) + 1].partition("=")[2]
        return self.run("dist_lm.launch", *overrides, log=work.parent / f"logs/{stage}-{time.time_ns()}.log")

    def copy(self, scratch: Path) -> Path:
        work = scratch / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.work, work, symlinks=True)
        return work


# --- What is compared -----------------------------------------------------------------------------------------------


def sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def tensors(file: Path) -> str:
    """A hash of names, types, shapes and bytes of the tensors of a safetensors file, whatever else its header holds."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    parts = []
    for name, tensor in sorted(header.items()):
        begin, end = tensor["data_offsets"]
        parts += [f"{name} {tensor['dtype']} {tensor['shape']}".encode(), content[8 + size :][begin:end]]
    return sha256(*parts)


def checkpoint(run: Path) -> dict[str, str]:
    """A hash for each file of tensors of the newest checkpoint."""
    newest = run / "checkpoints" / (run / "checkpoints/LATEST").read_text(encoding="utf-8").strip()
    return {f"{newest.name}/{file.name}": tensors(file) for file in sorted(newest.rglob("*.safetensors"))}


def metrics(run: Path) -> str:
    """A hash of all metrics of all steps, without measurements."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]
    return sha256(json.dumps(values, sort_keys=True).encode())


def files(folder: Path, *patterns: str) -> dict[str, str]:
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in paths}


def answers(run: Path) -> str:
    """A hash of the answers of a run of stage generate."""
    keys = ("id", "index", "text", "tokens", "finish", "raw_logprobs")
    lines = [json.loads(line) for part in sorted(run.glob("samples/part-*.jsonl")) for line in part.open()]
    assert lines, f"{run}: no answers"
    return sha256(json.dumps([[line.get(key) for key in keys] for line in lines]).encode())


def page_text(golden: Golden, work: Path, run_id: str, page: Path) -> str:
    """A hash of what the report of a pipeline says, without its time and the folder of the work directory."""
    log = page.with_suffix(".log")
    golden.run("dist_lm", "report", str(work), "--run-id", run_id, "--output", str(page), log=log)
    text = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"Made [-0-9]+ [0-9:]+", "", text.replace(str(golden.folder), ""))
    assert "val/loss" in text or "reward" in text, f"{page}: no figures"
    return sha256(" ".join(text.split()).encode())


def index_hashes(work: Path) -> dict[str, list[str]]:
    """Hashes of shard indexes by corpus and split, from the manifests: an index file also holds times of its tar."""
    manifests = {path.parent.name: json.loads(path.read_text()) for path in work.glob("corpora/*/manifest.json")}
    return {
        f"{corpus}/{split}": [shard["index_sha256"][:16] for shard in manifest["splits"][split]["shards"]]
        for corpus, manifest in sorted(manifests.items())
        for split in ("train", "val")
    }


def stage_and_run(texts: Sequence[str]) -> str:
    """STAGE/RUN_ID of a launch."""
    values = dict(text.split("=", 1) for text in texts)
    return f"{values['stage']}/{values.get('run_id', 'default')}"


def stopped_run(stage: str) -> tuple[str, ...]:
    return (*STOPPED[stage][1], "run_id=stopped")


# --- The parts ------------------------------------------------------------------------------------------------------


def finished(golden: Golden, scratch: Path) -> Iterator[tuple[str, Any]]:
    work = golden.copy(scratch)

    def contents() -> dict[str, str]:
        return files(work, "runs/*/*/checkpoints/**/*", "runs/*/*/metrics.jsonl", "runs/*/*/result.json", "corpora/*/*")

    before = contents()
    for name, texts in FINISHED.items():
        output = golden.launch(texts, work)
        plan = [line.split() for line in output.splitlines()]
        actions = sorted({words[1] for words in plan if len(words) > 1 and words[1] in ("there", "build", "resume")})
        yield f"plan of {name}", actions
    yield "files stay", contents() == before


def resume(golden: Golden, scratch: Path) -> Iterator[tuple[str, Any]]:
    work = golden.copy(scratch)
    for stage in STOPPED:
        golden.launch(stopped_run(stage), work)
        run = work / f"runs/{stage}/stopped"
        yield f"tensors of {stage}", checkpoint(run)
        yield f"metrics of {stage}", metrics(run)


def outputs(golden: Golden, scratch: Path) -> Iterator[tuple[str, Any]]:
    work = golden.copy(scratch)
    for name, texts in OUTPUTS.items():
        golden.launch(texts, work)
        run = work / "runs" / stage_and_run(texts)
        if name.startswith("generate"):
            yield name, answers(run)
        elif name.startswith("export"):
            # The other JSON files name the folder of the run.
            folder = scratch / "exports" / ("lora" if name == "export_lora" else "code")
            yield name, files(folder, "*.safetensors", "config.json", "tokenizer*", "special*", "*.jinja")
        elif name == "import":
            yield name, {**checkpoint(run), **files(run, "tokenizer/*", "conf/model/*")}
        else:
            result = json.loads((run / "result.json").read_text(encoding="utf-8"))
            for model in result["models"]:
                scores = sha256(json.dumps(model["tasks"], sort_keys=True).encode())
                figures = {task: task_result["figures"] for task, task_result in model["tasks"].items()}
                yield f"{name} {model['model']}", {**figures, "sha256": scores}
            yield f"{name}, comparisons", result["comparisons"]
    for run_id in ("default", "grpo"):
        yield f"report of {run_id}", page_text(golden, golden.work, run_id, scratch / f"{run_id}.html")


def fresh(golden: Golden, scratch: Path) -> Iterator[tuple[str, Any]]:
    work = scratch / "work"
    shutil.rmtree(work, ignore_errors=True)
    golden.launch(FRESH, work)
    yield "tokenizer", files(work, "tokenizer/tokenizer.model")
    yield "shards", files(work, "corpora/*/*.tar")
    yield "indexes", index_hashes(work)
    for stage in ("language", "code"):
        yield f"tensors of {stage}", checkpoint(work / f"runs/{stage}/default")
        yield f"metrics of {stage}", metrics(work / f"runs/{stage}/default")


PARTS: dict[str, Callable[[Golden, Path], Iterator[tuple[str, Any]]]] = {
    "finished": finished,
    "resume": resume,
    "outputs": outputs,
    "fresh": fresh,
}


# --- make and check -------------------------------------------------------------------------------------------------


def stop(golden: Golden, stage: str) -> None:
    """Begin a run and end it by USR1 once its step is reached: it writes a checkpoint."""
    step, _ = STOPPED[stage]
    run = golden.work / f"runs/{stage}/stopped"
    if (run / "checkpoints/LATEST").exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    log = golden.folder / f"logs/stopped-{stage}.log"
    process = golden.start("dist_lm.launch", *golden.overrides(stopped_run(stage), golden.work), log=log)
    while process.poll() is None and last_step(run / "metrics.jsonl") < step:
        time.sleep(0.1)
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
    code = process.wait()
    if code != USR1_EXIT or (run / "result.json").exists():
        raise RuntimeError(
            f"{stage}: exit code {code}, expected {USR1_EXIT}\n{log.read_text(encoding='utf-8')[-3000:]}"
        )


def last_step(file: Path) -> int:
    """The last step of a file of metrics that is being written."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def make(golden: Golden, parts: Sequence[str]) -> None:
    golden.folder.mkdir(parents=True, exist_ok=True)
    prompts = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    (golden.folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    if not (golden.work / "runs/rlhf/default/result.json").exists():
        report("quick start")
        command = ["bash", str(golden.checkout / "launch/quickstart.sh"), f"work_dir={golden.work}"]
        subprocess.run(command, env=golden.environment, check=True)
    golden.run("dist_lm.demo.ladder", str(golden.folder / "ladder"), log=golden.folder / "logs/ladder.log")
    for name, texts in FINISHED.items():
        report(name)
        golden.launch(texts, golden.work)
    for stage in STOPPED:
        report(f"{stage}, stopped")
        stop(golden, stage)

    (golden.folder / "expected").mkdir(exist_ok=True)
    for part in parts or PARTS:
        path = golden.folder / f"expected/{part}.json"
        if not path.exists():
            report(part)
            made = {"machine": machine(), "commit": commit(golden.checkout), "part": part, "seen": look(golden, part)}
            path.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        compare_with_committed(read(path))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def compare_with_committed(made: dict[str, Any]) -> None:
    """Say so if `make` gave other hashes than the committed ones, on the same kind of CPU by the same commit."""
    committed = read(COMMITTED).get(made["part"]) if COMMITTED.exists() else None
    if committed is None or any(committed[key] != made[key] for key in ("machine", "commit")):
        return
    # Reports quote times, so they are equal for one folder only and are not committed.
    if any(made["seen"].get(name) != hashed for name, hashed in committed["seen"].items()):
        report(f"{made['part']}: not as in {COMMITTED.name}, although commit and machine are the same")


def look(golden: Golden, part: str) -> dict[str, Any]:
    """What the code of `golden` makes of a copy of its work directory."""
    # Several checks may run beside each other. A scratch folder stays where a part fails, with its logs.
    scratch = Path(tempfile.mkdtemp(prefix=f"{part}-", dir=golden.folder))
    seen = json.loads(json.dumps(dict(PARTS[part](golden, scratch))))
    shutil.rmtree(scratch)
    return seen


def machine() -> dict[str, str]:
    """What bits depend on."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": capability, "torch": torch.__version__, "python": platform.python_version()}


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def report(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def check(golden: Golden, parts: Sequence[str]) -> bool:
    """Compare what the present code makes of the golden directory with `expected`. Returns whether all is equal."""
    equal = True
    for part in parts or PARTS:
        begin = time.monotonic()
        expected = read(golden.folder / f"expected/{part}.json")
        if expected["machine"] != machine():
            report(f"made on {expected['machine']}, this is {machine()}: bits may differ")
        seen = look(golden, part)
        for name in sorted({*seen, *expected["seen"]}):
            before, now = expected["seen"].get(name), seen.get(name)
            if before != now:
                equal = False
                report(f"DIFFERENT {part}: {name}\n  was {json.dumps(before)}\n  is  {json.dumps(now)}")
        report(f"{part}: {len(seen)} compared in {time.monotonic() - begin:.0f} s")
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make")
    maker.add_argument("checkout", type=Path)
    checker = verbs.add_parser("check")
    for verb in (maker, checker):
        verb.add_argument("folder", type=Path)
        verb.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    arguments = parser.parse_args()
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"unknown part {', '.join(unknown)}: expected {', '.join(PARTS)}")
    if arguments.verb == "make":
        make(Golden(arguments.folder, arguments.checkout), arguments.parts)
        return 0
    return 0 if check(Golden(arguments.folder, HERE), arguments.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
