"""SmolLM2-135M-Instruct on tasks, beside transformers. SMOLLM2_SNAPSHOT is a folder of its files, HUMANEVAL the file of
that task (optional)."""

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from dist_lm.evaluation.figures import request_of
from dist_lm.evaluation.statistics import estimate
from dist_lm.evaluation.tasks import OWN_TASKS, Asking, Item, items_of
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import Answer
from dist_lm.generation.session import build_engine
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.storage.run_directory import WorkDirectory
from tests.evaluation.choice_task import CHOICES

transformers = pytest.importorskip("transformers")
SNAPSHOT, HUMANEVAL = os.environ.get("SMOLLM2_SNAPSHOT", ""), os.environ.get("HUMANEVAL", "")
pytestmark = [
    pytest.mark.bars,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not SNAPSHOT, reason="SMOLLM2_SNAPSHOT names no folder"),
]
NEW_TOKENS = 64
EVERY = 10  # of the own problems; of HumanEval every EVERY * 2
CHOSEN = 4  # of the functions of HumanEval every CHOSEN, for lm_eval
CLOSE = 1e-3  # between the two largest logits: rounding may choose either
BODIES = 4  # of functions, one of which belongs to the prompt


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    work = WorkDirectory(tmp_path_factory.mktemp("smollm2") / "work")
    return load_model(import_model(SNAPSHOT, "smol", work).path)


def asked(loaded: LoadedModel) -> Iterator[tuple[str, Item]]:
    """Questions of the tasks, as turns of a user."""
    asking = Asking.greedy(loaded.tokenizer, loaded.config.max_seq_len, True, NEW_TOKENS)
    files = {"humaneval": Path(HUMANEVAL)} if HUMANEVAL else {}
    for task in (*OWN_TASKS, *files):
        for item in items_of(task, asking, files, Path())[:: EVERY * (1 + (task in files))]:
            yield task, item


def answers(loaded: LoadedModel, questions: Sequence[tuple[str, Item]]) -> list[Answer]:
    engine = build_engine(loaded, torch.device("cpu"), 16)
    for number, (task, item) in enumerate(questions):
        engine.submit(request_of(number, task, item, 0))
    found = [done for done in engine.run() if isinstance(done, Answer)]
    return sorted(found, key=lambda one: int(one.request))


def test_greedy_answers_to_tasks_are_those_of_transformers(loaded: LoadedModel):
    questions = list(asked(loaded))
    model = transformers.AutoModelForCausalLM.from_pretrained(SNAPSHOT, dtype=torch.float32, local_files_only=True)
    compared, equal, parted = 0, 0, []
    for (_, item), answer in zip(questions, answers(loaded, questions), strict=True):
        out = model.generate(
            torch.tensor([list(item.prompt)]),
            attention_mask=torch.ones(1, len(item.prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[loaded.tokenizer.eot_id, *item.params.stop_tokens],
            pad_token_id=loaded.tokenizer.pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected, found = out.sequences[0, len(item.prompt) :].tolist(), list(answer.tokens)
        place = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        compared += len(expected) if place is None else place
        if place is None:
            assert len(found) == len(expected), item.id
            equal += 1
            continue
        first, second = out.logits[place][0].topk(2).values.tolist()
        assert first - second < CLOSE, (item.id, place, first - second)
        parted.append((item.id, place, first - second))
    print(f"\n{equal} of {len(questions)} answers equal, {compared:,} tokens compared; parted at near ties: {parted}")


@pytest.mark.skipif(not HUMANEVAL, reason="HUMANEVAL names no file")
def test_a_task_of_lm_eval_has_the_figures_of_the_hf_backend(loaded: LoadedModel, tmp_path: Path, monkeypatch):
    """Which of four bodies belongs to a function of HumanEval; no network."""
    harness = pytest.importorskip("dist_lm.evaluation.harness", reason="lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    lines = []
    for number, problem in list(enumerate(problems))[::CHOSEN]:
        others = [problems[(number + 41 * place) % len(problems)]["canonical_solution"] for place in range(BODIES)]
        label = number // CHOSEN % BODIES
        bodies = others[1:]
        bodies.insert(label, others[0])
        lines.append(json.dumps({"context": problem["prompt"], "choices": bodies, "label": label}))
    (tmp_path / "choices.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "choices.yaml").write_text(CHOICES.format(folder=tmp_path) + 'target_delimiter: ""\n')
    options = harness.HarnessOptions(("choices",), include_path=tmp_path, defaults=False)
    ours = harness.run_harness(harness.EngineModel(loaded, torch.device("cpu"), torch.float32), options)
    theirs = harness.run_harness(HFLM(SNAPSHOT, device="cpu", dtype="float32", batch_size=1), options)
    found, expected = (one["results"]["choices"] for one in (ours, theirs))
    for metric in ("acc", "acc_norm"):
        assert found[f"{metric},none"] == expected[f"{metric},none"]
        values = [sample[metric] for sample in ours["samples"]["choices"]]
        print(f"\n{metric}: {estimate(values)} of {len(values)}")
