"""A server over runs of adapters: those of one base share its weights, and answer as each does alone."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.root import save_config
from dist_lm.config.stage import LoraConfig
from dist_lm.errors import ConfigError
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.server.command import ServeOptions, _groups
from dist_lm.server.door import DoorRules
from dist_lm.server.model_files import by_base, find_models, refuse_repeated
from dist_lm.server.models import ModelOptions, check_memory, load_served
from dist_lm.server.served import ServeLimits
from dist_lm.server.serving import Serving
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training import checkpoint_files as files
from dist_lm.training.state import TrainState
from tests.conftest import TINY
from tests.patience import patient
from tests.server.conftest import serving_of
from tests.training_run import linked

OPTIONS = ModelOptions(torch.device("cpu"), tp=1, cache_tokens=2048, queue_s=60, limits=ServeLimits())
WIDE = "model.init_std=0.2"  # opinions, without training
LOCAL = DoorRules("127.0.0.1")
BODY = {"prompt": "def add(", "max_tokens": 12, "temperature": 1, "logprobs": 1, "return_token_ids": True}


def write(work: WorkDirectory, run_id: str, base: Path | None = None, seed: int = 0, **lora: Any) -> RunDirectory:
    """A run of stage code with an untrained model, or with adapters of `base` that change what it says."""
    config = compose_config(["stage=code", *TINY, WIDE, f"run_id={run_id}", f"work_dir={work.path}"])
    shape = config.model
    if base:
        adapted = LoraConfig(**{"rank": 3, "alpha": 6.0} | lora)
        shape = AdaptedModelConfig.of(shape, adapted, str(base.resolve()), files.fingerprint(base))
    model = Transformer(shape)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    run = work.run("code", run_id)
    run.create()
    save_config(config, run.config)
    state = TrainState(step=10 + seed, tokenizer=Tokenizer.load(work.tokenizer_model).sha256)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensors = checkpoint.tensors_of(model, None, shape)
        checkpoint_saver.write(run.checkpoints, tensors, state, shape, World(0, 1, 0, torch.device("cpu")))
    finally:
        dist.destroy_process_group()
    return run


@pytest.fixture(scope="module")
def runs(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """A base and two runs of adapters, and what shares its weights with none of them."""
    work = linked(tiny_work, tmp_path_factory.mktemp("adapters") / "work")
    base = write(work, "base")
    checkpoint_of_base = files.find_checkpoint(base.path)
    another = write(work, "another", seed=9)
    return {
        "base": base,
        "one": write(work, "one", checkpoint_of_base, seed=1),
        "two": write(work, "two", checkpoint_of_base, seed=2, targets=["query", "down"], rslora=True),
        "another": another,
        "of another": write(work, "of_another", files.find_checkpoint(another.path), seed=3),
        "in 4 bits": write(work, "in_4bit", checkpoint_of_base, seed=4, load_in_4bit=True),
        "trained tokens": write(work, "tokens", checkpoint_of_base, seed=5, tokens=["<|im_start|>"]),
    }


def paths_of(runs: dict[str, RunDirectory], *names: str) -> list[Path]:
    return [runs[name].path for name in names]


def ids_of(groups: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [[model.name.split("/")[1] for model in group] for group in groups]


def test_models_that_requests_cannot_tell_apart_are_refused_before_they_load(runs: dict[str, RunDirectory]):
    """Finds a run given twice that is loaded first and then refused in words that name no option of the command."""
    refuse_repeated(find_models(paths_of(runs, "base", "one", "two"), ["base", "one", "two"]))
    for repeated in (["one", "one"], ["base", "base"]):
        with pytest.raises(ConfigError, match=r"run=.*each model once"):
            refuse_repeated(find_models(paths_of(runs, *repeated), []))
    with pytest.raises(ConfigError, match="--name=ours: expected another name for each model"):
        refuse_repeated(find_models(paths_of(runs, "base", "one"), ["ours", "ours"]))


def test_models_of_one_base_are_one_group(runs: dict[str, RunDirectory], capsys: pytest.CaptureFixture[str]):
    """Finds adapters over a base that is not theirs, changed tensors of a base that are lost, and a lone run of
    adapters that is served otherwise than before."""
    models = find_models(paths_of(runs, *runs), [])
    expected = [["base", "one", "two"], ["another", "of_another"], ["in_4bit"], ["tokens"]]
    assert ids_of(by_base(models)) == expected
    assert ids_of(by_base(find_models(paths_of(runs, "one"), []))) == [["one"]]
    assert ids_of(by_base(find_models(paths_of(runs, "base", "base"), []))) == [["base"], ["base"]]
    assert ids_of(by_base(find_models(paths_of(runs, "one", "two"), []))) == [["one", "two"]]

    of_base = find_models(paths_of(runs, "base", "one"), [])
    for options, words in (
        (ServeOptions(merge=True), "--merge: "),
        (ServeOptions(tp=2), "--tp 2: "),
        (ServeOptions(follow=True), "--follow: "),
    ):
        assert ids_of(_groups(of_base, options)) == [["base"], ["one"]]
        assert capsys.readouterr().out.startswith(words)
    assert ids_of(_groups(of_base, ServeOptions())) == [["base", "one"]]
    assert not capsys.readouterr().out


def test_a_base_counts_once_in_memory(runs: dict[str, RunDirectory]):
    """Finds a server that refuses models which fit."""
    models = find_models(paths_of(runs, "base", "one", "two"), [])
    assert check_memory(by_base(models), OPTIONS).startswith("3 models, 3 of them over one base: weights 0.00 GiB")
    small = replace(OPTIONS, cache_tokens=1)
    assert check_memory([[model] for model in models], small).startswith("3 models: weights 0.00 GiB")


def post(url: str, path: str, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}{path}", json=fields, timeout=patient(60))
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.heavy
def test_requests_get_the_adapter_that_they_name(runs: dict[str, RunDirectory]):
    """Finds a request that is answered by another adapter or by the base, a version or an embedding of another model,
    and an engine that ends twice or not at all."""
    models = find_models(paths_of(runs, "base", "one", "two"), ["base", "one", "two"])
    together = load_served(models, None, OPTIONS)
    alone = [load_served([model], None, OPTIONS)[0] for model in models]
    assert len(Serving(together, 8).threads) == 1
    with serving_of(together, LOCAL) as shared, serving_of(alone, LOCAL) as apart:
        seen: set[tuple[int, ...]] = set()
        for name, version in (("base", 10), ("one", 11), ("two", 12)):
            fields = {**BODY, "model": name, "seed": 3}
            found, expected = (post(url, "/v1/completions", **fields) for url, _ in (shared, apart))
            (choice,), (own_choice,) = found["choices"], expected["choices"]
            assert choice["token_ids"] == own_choice["token_ids"]
            assert choice["raw_logprobs"] == pytest.approx(own_choice["raw_logprobs"], abs=1e-5)
            assert found["weights_version"] == expected["weights_version"] == version
            seen.add(tuple(choice["token_ids"]))

            fields = {"model": name, "input": "def add("}
            (vector,), (own,) = (post(url, "/v1/embeddings", **fields)["data"] for url, _ in (shared, apart))
            assert vector["embedding"] == pytest.approx(own["embedding"], abs=1e-5)
        assert len(seen) == 3
        figures = httpx.get(f"{shared[0]}/metrics").text
        names = ",".join(model.name for model in models)
        assert f'dist_lm_answers_total{{model="{names}"}} 6' in figures


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options", [(), pytest.param(("--actors", "1"), marks=[pytest.mark.cluster, pytest.mark.heavy])]
)
def test_the_command_serves_adapters_over_one_base(runs: dict[str, RunDirectory], options: tuple[str, ...]):
    """Finds actors without the adapters, and a base whose run is not served itself."""
    names = [part for name in ("one", "two") for part in ("--name", name)]
    paths = map(str, paths_of(runs, "one", "two"))
    command = [sys.executable, "-m", "dist_lm", "serve", *paths, *names, "--port", "0", "--device", "cpu", *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            expected = "1 actor at " if options else "2 models, 2 of them over one base: "
            assert process.stdout.readline().startswith(expected)
            url = process.stdout.readline().split("http", 1)[1].split("/v1", 1)[0]
            answers = [post(f"http{url}", "/v1/completions", **BODY, model=name) for name in ("one", "two")]
            assert [answer["weights_version"] for answer in answers] == [11, 12]
            process.send_signal(signal.SIGTERM)
            assert process.wait(patient(60)) == 0
        finally:
            process.kill()
