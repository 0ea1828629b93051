"""Conversations of several samples in rows: each token that was drawn is seen once, in its own text."""

import json
import zlib
from random import Random

import numpy as np
import pytest
import torch

from dist_lm.environments.protocol import Verdict
from dist_lm.errors import ArtefactError
from dist_lm.rlhf.episodes import Episode, EpisodeFile, Turn, read_episodes, recorded_lines, rollouts_of_episodes
from dist_lm.rlhf.experience import token_logprobs
from dist_lm.rlhf.packed_rollouts import Dealing, completion_mask, rollout_batches
from dist_lm.rlhf.transcript import Sample
from tests.model.small_models import small_config, small_model


def sample_of(random: Random) -> Sample:
    """Returns ids of which runs were drawn, from the second on, with the last one drawn."""
    drawn = [False, *(random.random() < 0.5 for _ in range(random.randint(0, 12))), True]
    return Sample([random.randint(1, 60) for _ in drawn], drawn)


def episode_of(position: int, random: Random, n_samples: int) -> Episode:
    samples = tuple(sample_of(random) for _ in range(n_samples))
    n_drawn = sum(sum(sample.drawn) for sample in samples)
    logprobs = tuple(float(np.float32(-random.random())) for _ in range(n_drawn))
    verdict = Verdict.of(random.random()) if n_samples else Verdict.failed("timeout", "slow")
    turns = (Turn(n_drawn, True, {"text": "a", "calls": [], "cut": None}, None, 0.5, 1),)
    return Episode(position, 0, f"task {position}", 3, verdict, "", {"messages": []}, turns, samples, logprobs)


def episodes() -> list[Episode]:
    random = Random(0)
    return [episode_of(position, random, n_samples) for position, n_samples in enumerate((1, 3, 0, 2, 1, 0, 4))]


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 1000])
@pytest.mark.parametrize("dp_size", [1, 3])
def test_logprobs_are_those_of_each_sample_alone(micro_batch_tokens, dp_size):
    """Finds a row, target or column of another token; a token that no rank sees, or that two see."""
    held = episodes()
    rollouts = rollouts_of_episodes(held)
    usable = rollouts.chosen(rollouts.failure_B < 0)
    model, shape = small_model(small_config()), completion_mask(usable).shape
    found_BT = torch.zeros(shape)
    for dp_rank in range(dp_size):
        dealing = Dealing(micro_batch_tokens, dp_rank, dp_size)
        # Two minibatches hold all conversations, each with all of its samples.
        for chosen in (np.array([3, 0]), np.array([4, 1, 2])):
            found_BT += token_logprobs(model, rollout_batches(usable, chosen, dealing), shape, 1.0)[0]

    for b, episode in enumerate(e for e in held if e.verdict.valid):
        alone = []
        for sample in episode.samples:
            ids = torch.tensor([sample.ids])
            with torch.no_grad():
                logprob_TV = model(ids)[0].log_softmax(-1)
            alone += [float(logprob_TV[i - 1, sample.ids[i]]) for i, drawn in enumerate(sample.drawn) if drawn]
        assert len(alone) == usable.new_tokens_B[b]
        torch.testing.assert_close(found_BT[b, : len(alone)], torch.tensor(alone), rtol=1e-5, atol=1e-5)
        assert not found_BT[b, len(alone) :].any()


def test_chosen_conversations_are_whole():
    """Finds a choice that cuts samples, masks or log-probabilities at other places than ids."""
    held = episodes()
    chosen_B = np.array([False, True, True, False, True, True, True])
    chosen = rollouts_of_episodes(held).chosen(chosen_B)
    expected = rollouts_of_episodes([episode for episode, keep in zip(held, chosen_B, strict=True) if keep])
    for name, array in vars(expected).items():
        np.testing.assert_array_equal(getattr(chosen, name), array, err_msg=name)
    for rollout, episode in zip(chosen, [held[i] for i in np.flatnonzero(chosen_B)], strict=True):
        ids = [token for sample in episode.samples for token in sample.ids]
        assert [*rollout.prompt.tolist(), *rollout.completion.tolist()] == ids


def test_a_file_gives_back_what_was_added_and_drops_what_is_damaged(tmp_path, caplog):
    """Finds numbers that a record changes, and lines that are used though they are damaged or of another run."""
    path, held = tmp_path / "tasks.jsonl", episodes()
    with EpisodeFile(path, "settings", 3) as file:
        for episode in held:
            file.add(episode)
    assert read_episodes(path) == held

    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("0.5", "0.25", 1)  # a changed reward
    path.write_text("\n".join([*lines[:-1], lines[-1][:50]]))
    with EpisodeFile(path, "settings", 3) as file:
        assert [*file.finished.values()] == [held[0], *held[2:-1]]
        file.add(held[1])
    assert "line 2 is damaged" in caplog.text
    assert "line 7 is damaged" in caplog.text
    assert read_episodes(path) == [held[0], held[1], *held[2:-1]]
    for settings, version in (("others", 3), ("settings", 4)):
        copy = tmp_path / f"{settings}_{version}.jsonl"
        copy.write_text(path.read_text())
        with EpisodeFile(copy, settings, version) as file:
            assert not file.finished


@pytest.mark.parametrize(
    "change",
    [
        lambda episode: episode["logprobs"].append(-1.0),
        lambda episode: episode["samples"][0]["ids"].append(7),
        lambda episode: episode["samples"][0]["ids"].__setitem__(0, "7"),
        lambda episode: episode.update(position=-1),
        lambda episode: episode.update(cut="boredom"),
        lambda episode: episode["turns"][0].update(new_tokens=10**9),
        lambda episode: episode["turns"][0].update(reward="1"),
        lambda episode: episode.update(turns=None),
    ],
)
def test_a_line_whose_numbers_do_not_fit_together_is_damaged(change, tmp_path, caplog):
    """Finds a record with a right checksum whose arrays would have different lengths, or hold no numbers."""
    path = tmp_path / "tasks.jsonl"
    with EpisodeFile(path, "settings", 3) as file:
        file.add(episodes()[0])
    content = json.loads(path.read_text())
    change(content["episode"])
    content["crc32"] = zlib.crc32(json.dumps(content["episode"]).encode())
    path.write_text(json.dumps(content) + "\n")

    with pytest.raises(ArtefactError, match=r"tasks.jsonl: line 1 is damaged"):
        next(recorded_lines(path))
    assert read_episodes(path) == []
    assert "line 1 is damaged" in caplog.text
