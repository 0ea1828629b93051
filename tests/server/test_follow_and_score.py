"""Runs on disk: their new checkpoints are followed, and the scores of reward models are those of training."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.template import answer_tokens, prompt
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import save_config
from dist_lm.errors import ConfigError
from dist_lm.generation.load import LoadedModel
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.reward_model import last_token_scores
from dist_lm.server.door import DoorRules
from dist_lm.server.follow import Follower
from dist_lm.server.model_files import find_models
from dist_lm.server.models import ModelOptions, check_memory, load_reward, load_served
from dist_lm.server.served import ServeLimits
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training.state import TrainState
from tests.conftest import TINY
from tests.patience import patient
from tests.server.conftest import served
from tests.server.test_clients import IDS, MESSAGES

OPTIONS = ModelOptions(torch.device("cpu"), tp=1, cache_tokens=2048, queue_s=60, limits=ServeLimits())
LOCAL = DoorRules("127.0.0.1")


@pytest.fixture
def run(tiny_work: WorkDirectory, tmp_path: Path) -> Iterator[RunDirectory]:
    """A run without a checkpoint."""
    work = WorkDirectory(tmp_path / "work")
    work.path.mkdir()
    (work.path / "tokenizer").symlink_to(tiny_work.path / "tokenizer")
    run = work.run("code", "small")
    run.create()
    save_config(compose_config(["stage=code", *TINY, "run_id=small", f"work_dir={work.path}"]), run.config)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield run
    dist.destroy_process_group()


def write(run: RunDirectory, step: int, config: ModelConfig | None = None) -> Transformer:
    """Writes a checkpoint whose weights are drawn with its step, and makes it the latest."""
    config = config or compose_config(["stage=code", *TINY, "model.init_std=0.2"]).model
    model = Transformer(config)
    initialise(model, seed=step)
    tensors = checkpoint.tensors_of(model, None, config)
    checkpoint_saver.write(run.checkpoints, tensors, TrainState(step=step), config, World(0, 1, 0, torch.device("cpu")))
    return model.requires_grad_(requires_grad=False).eval()


@pytest.mark.heavy
def test_new_checkpoints_are_served_and_damaged_ones_are_not(
    run: RunDirectory, model: Transformer, loaded: LoadedModel
):
    """Finds a server that keeps old weights, says another version, or ends with a damaged checkpoint."""
    write(run, 10)
    (files,) = find_models([run.path], ["ours"], follow=True)
    assert files.name == "code/small"
    (followed,) = load_served([files], None, OPTIONS)
    lines: list[str] = []
    reported = threading.Semaphore(0)

    def report(line: str) -> None:
        lines.append(line)
        reported.release()

    follower = Follower(files.path, None, files.checkpoint, followed.thread, report, poll_s=0.02)
    with served(model, loaded, LOCAL, others=[followed]) as running:

        def ask() -> Any:
            body = {"model": "ours", "messages": MESSAGES, "max_tokens": 8, "seed": 1, **IDS}
            return running.post("/v1/chat/completions", body).json()

        before = ask()
        follower.start()
        write(run, 20)
        assert reported.acquire(timeout=patient(30))
        after = ask()

        damaged = run.checkpoints / "step_00000030"
        write(run, 30)
        next(damaged.glob("*.safetensors")).write_bytes(b"")
        assert reported.acquire(timeout=patient(30))
        still = ask()
        follower.stop(patient(30))
    assert [answer["weights_version"] for answer in (before, after)] == [10, 20]
    assert before["choices"][0]["token_ids"] != after["choices"][0]["token_ids"]
    # The damage may come before or behind the reading of the file.
    assert ("is not served" in lines[1]) == (still["weights_version"] == 20)


def test_a_checkpoint_itself_cannot_be_followed(run: RunDirectory):
    write(run, 10)
    with pytest.raises(ConfigError, match="--follow"):
        find_models([run.checkpoints / "step_00000010"], [], follow=True)


def test_names_belong_to_models_and_memory_is_compared(run: RunDirectory):
    """Finds a name of one model on another, and a server that dies of memory only when all is loaded."""
    write(run, 10)
    with pytest.raises(ConfigError, match="--name"):
        find_models([run.path, run.path], ["ours"])
    models = find_models([run.path, run.path], ["ours", "theirs"])
    assert [model.aliases for model in models] == [("ours",), ("theirs",)]
    assert "2 models: weights 0.00 GiB" in check_memory([[model] for model in models], OPTIONS)
    with pytest.raises(ConfigError, match="--cache-tokens"):
        check_memory([models[:1], models[1:]], replace(OPTIONS, cache_tokens=10**12))


@pytest.mark.heavy
def test_scores_are_those_of_the_reward_model(run: RunDirectory, model: Transformer, loaded: LoadedModel):
    """Finds another layout of the turn than in training, and scores in another order."""
    config = replace(compose_config(["stage=code", *TINY, "model.init_std=0.2"]).model, head="scalar")
    reward = write(run, 10, config)
    (files,) = find_models([run.path], ["judge"])
    judge = load_reward(files, None, OPTIONS)
    question = Conversation((Message("user", "Is it dry?"),))
    answers = ["Yes.", "No, it rains a lot.", "Perhaps"]
    sequences = [
        [*prompt(question, loaded.tokenizer), *answer_tokens(Message("assistant", text), loaded.tokenizer, question)]
        for text in answers
    ]
    expected = last_token_scores(reward, sequences).tolist()

    with served(model, loaded, LOCAL, rewards=[judge]) as running:
        conversations = [
            [{"role": "user", "content": "Is it dry?"}, {"role": "assistant", "content": text}] for text in answers
        ]
        by_turns = running.post("/score", {"model": "judge", "messages": conversations}).json()
        by_ids = running.post("/score", {"input": sequences}).json()
        assert [each["score"] for each in by_turns["data"]] == pytest.approx(expected, abs=1e-5)
        assert by_ids["data"] == by_turns["data"]
        assert by_turns["weights_version"] == 10
        assert by_turns["data"][0]["normalised"] is None

        for body in ({}, {"input": []}, {"input": [[-1]]}, {"input": "a", "n": 2}, {"messages": conversations[0][:1]}):
            assert running.post("/score", body).status_code == 400, body
        assert running.post("/score", {"input": ["a"] * 65}).status_code == 400
        assert running.post("/score", {"input": "word " * 4000}).status_code == 400
        assert running.post("/score", {"model": "small", "input": "a"}).status_code == 404
        assert running.post("/v1/completions", {"model": "judge", "prompt": "a"}).status_code == 404
