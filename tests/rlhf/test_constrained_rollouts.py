"""Rollouts drawn under constraints: learners compute the allowed tokens again, from grammar and tokens alone."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.numpy import load

from dist_lm.chat.messages import Tool
from dist_lm.chat.parse import parse_turn
from dist_lm.chat.schema import problems
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.constraint import Constraint, GrammarRecord
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.grammar import Grammars, library_version
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig
from dist_lm.rlhf.constrained_rollouts import RolloutConstraints
from dist_lm.rlhf.experience import token_logprobs
from dist_lm.rlhf.packed_rollouts import Dealing, completion_mask, rollout_batches
from dist_lm.rlhf.rollouts import EngineRollouts, Rollouts, ScoredRollouts, concatenated, library_of, packed_record
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.rlhf.toy import MODEL, Toy, assert_ends_alike, run_from, saving, supply_in, toy, with_supply

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "grey"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["colour", "days"],
    "additionalProperties": False,
}
TOOLS = (
    Tool("to", "d", {"type": "object", "properties": {"x": {"enum": ["up", "down", "back"]}}, "required": ["x"]}),
    Tool("at", "d", {"type": "object", "properties": {"y": {"type": "integer", "minimum": 0, "maximum": 50}}}),
)
NEAR = 1e-6


@pytest.fixture(scope="module")
def tokenizer(tiny_work: WorkDirectory) -> Tokenizer:
    return Tokenizer.load(tiny_work.tokenizer_model)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> ModelConfig:
    return replace(MODEL, vocab_size=tokenizer.vocab_size, max_seq_len=128)


def schema_at(position: int) -> Constraint:
    return Constraint.from_json({"json_schema": SCHEMA})


def constraints_of(tokenizer: Tokenizer, kind: str) -> RolloutConstraints:
    """Constraints of the toy's prompts; a model that has learned nothing rarely begins a call, so most must call."""

    def calls_at(position: int) -> Constraint:
        choice = ToolChoice("auto" if position % 3 == 0 else "required")
        return call_constraint(TOOLS[: 1 + position % 2], tokenizer, choice)

    ends = (tokenizer.eot_id, tokenizer.mark_id("<|im_end|>"))
    constraint_at: Callable[[int], Constraint] = calls_at if kind == "calls" else schema_at
    return RolloutConstraints(Grammars(lambda: tokenizer), constraint_at, ends, tokenizer.vocab_size)


def config_of(algorithm: str, **others) -> RlhfConfig:
    shared = {"prompts": 4, "samples": 2, "max_new_tokens": 30, "epochs": 2, "lr": 1e-3, "kl_coefficient": 0.05}
    length = RewardPartConfig(kind="length", target=20)
    return RlhfConfig(algorithm=algorithm, rewards={"length": length}, **(shared | others))


def constrained_toy(
    config: RlhfConfig, iterations: int, model: ModelConfig, tokenizer: Tokenizer, constraints: RolloutConstraints
) -> Toy:
    def source() -> EngineRollouts:
        options = EngineOptions(cache_tokens=64 * 64, page_tokens=64, max_sequences=64)
        weights = dict(Transformer(model).state_dict())
        grammars = Grammars(lambda: tokenizer)
        return EngineRollouts(Engine(model, weights, eot_id=tokenizer.eot_id, options=options, grammars=grammars))

    made = toy(config, iterations, model=model, source=source, stop_tokens=constraints.ends[1:])
    with_supply(made, replace(supply_in(made), constraint_at=constraints.constraint_at))
    made.learner = replace(made.learner, constraints=constraints)
    return made


def drawn_under(
    tokenizer: Tokenizer, model: ModelConfig, constraints: RolloutConstraints, **params
) -> tuple[Rollouts, Transformer]:
    """Rollouts of one iteration, and the model that drew them."""
    config = config_of("grpo", **params)
    made = constrained_toy(config, 1, model, tokenizer, constraints)
    supply, policy = supply_in(made), made.learner.models.policy.model
    supply.source.load_weights(dict(policy.named_parameters()), 0)
    return supply.draw(supply.prompts(0, config.prompts), 0, config.rollouts_per_prompt, config, 0), policy


# --- whole iterations ---


@pytest.mark.heavy
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("algorithm", "kind", "filters"),
    [
        ("grpo", "schema", {}),
        ("grpo", "calls", {"top_k": 20}),
        ("ppo", "calls", {}),
        pytest.param("ppo", "schema", {"top_k": 20}, marks=pytest.mark.heavy),
        pytest.param("grpo", "schema", {"top_p": 0.8}, marks=pytest.mark.heavy),
        pytest.param("dapo", "calls", {}, marks=pytest.mark.heavy),
    ],
)
def test_engine_trainer_and_reference_speak_of_one_distribution_and_the_first_ratio_is_1(
    tokenizer, model, algorithm, kind, filters
):
    """Finds a learner, or a reference, that computes probabilities over tokens that could not be drawn."""
    constraints = constraints_of(tokenizer, kind)
    config = config_of(algorithm, temperature=0.8, micro_batch_tokens=60, **filters)
    made = constrained_toy(config, 2, model, tokenizer, constraints)
    made.run()

    finishes = set()
    for report in made.reports:
        assert report.updates[0]["ratio_mean"] == pytest.approx(1, abs=NEAR)
        assert report.updates[0]["approx_kl"] == pytest.approx(0, abs=1e-9)
        assert report.updates[1]["approx_kl"] > 1e-9
        assert 0 < report.metrics["rollout/forced_rate"] < 1
        # What a grammar and the tokens tell is not sent.
        assert bool(len(report.rollouts.set_size_M)) == bool(filters)
        assert {library_of(record_G) for record_G in report.rollouts.grammar_BG} == {library_version()}
        for rollout in report.rollouts:
            finishes.add(rollout.finish)
            if rollout.ended:
                assert_fulfils(kind, rollout.position, rollout.completion.tolist(), tokenizer)
    # The tokens of answers that were cut off have sets, too.
    assert "length" in finishes
    assert finishes & {"eot", "stop"}
    assert max(made.metric("rollout/logprob_gap")) < 1e-5
    assert made.metric("rlhf/kl")[0] == pytest.approx(0, abs=1e-5)


def assert_fulfils(kind: str, position: int, completion: list[int], tokenizer: Tokenizer) -> None:
    if kind == "schema":
        jsonschema.validate(json.loads(tokenizer.decode(completion)), SCHEMA)
        return
    turn = parse_turn([token for token in completion if token != tokenizer.eot_id], tokenizer)
    assert turn.calls or position % 3 == 0
    for call in turn.calls:
        tool = {tool.name: tool for tool in TOOLS[: 1 + position % 2]}[call.name]
        assert not [*problems(call, (tool,))]


@pytest.mark.heavy
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["calls", pytest.param("schema", marks=pytest.mark.heavy)])
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(tokenizer, model, kind):
    """Finds rollouts drawn ahead that lose the record of their grammar, or sets that depend on what came before."""
    constraints = constraints_of(tokenizer, kind)
    config = config_of("grpo", max_staleness=1)
    whole = constrained_toy(config, 4, model, tokenizer, constraints)
    saved = saving(whole)
    whole.run()
    assert any(name.endswith("grammar_BG") and len(array) for name, array in load(saved[2].arrays).items())

    resumed = constrained_toy(config, 4, model, tokenizer, constraints_of(tokenizer, kind))
    run_from(resumed, saved[2])
    assert_ends_alike(resumed, whole, saved, 2)


# --- against the definition ---


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["schema", "calls"])
@pytest.mark.parametrize("chunk_bytes", [0, 3000])
def test_logprobs_are_those_of_a_dense_softmax_over_the_allowed_tokens(tokenizer, model, kind, chunk_bytes):
    """The mask is applied to all logits in fp64: finds sets of other tokens than those they stand for."""
    constraints, temperature = constraints_of(tokenizer, kind), 0.7
    rollouts, policy = drawn_under(tokenizer, model, constraints, temperature=temperature)
    policy.chunk_bytes = chunk_bytes
    sets_of = constraints.sets_of(rollouts)
    batches = []
    for part in np.array_split(np.arange(len(rollouts)), 3):
        batches += rollout_batches(rollouts, part, Dealing(90), sets_of)
    shape = completion_mask(rollouts).shape
    logprob_BT, entropy_BT = token_logprobs(policy, batches, (shape[0], shape[1]), temperature)

    # Matchers of their own, which know nothing of rollouts.
    grammars = Grammars(lambda: tokenizer)
    for row, rollout in enumerate(rollouts):
        matcher = grammars.matcher(constraints.constraint_at(rollout.position), constraints.ends)
        bits = []
        for token in rollout.completion[:-1].tolist():
            bits.append(matcher.allowed())
            matcher.take(token)
        bits.append(matcher.allowed())
        is_allowed_TV = torch.from_numpy(np.unpackbits(np.stack(bits), axis=1, bitorder="little")).bool()
        is_allowed_TV = is_allowed_TV[:, : tokenizer.vocab_size]

        new = len(rollout.completion)
        tokens = torch.from_numpy(np.concatenate([rollout.prompt, rollout.completion]))[None]
        with torch.no_grad():
            x_TV = policy(tokens)[0, -new - 1 : -1].double() / temperature
        logprob_TV = x_TV.masked_fill(~is_allowed_TV, -math.inf).log_softmax(-1)
        expected_T = logprob_TV.gather(-1, torch.from_numpy(rollout.completion)[:, None])[:, 0]
        entropy_T = -(logprob_TV.exp() * logprob_TV.where(is_allowed_TV, 0)).sum(-1)
        torch.testing.assert_close(logprob_BT[row, :new].double(), expected_T, rtol=0, atol=NEAR)
        torch.testing.assert_close(torch.from_numpy(rollout.logprobs).double(), expected_T, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy_BT[row, :new].double(), entropy_T, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_equal_sets_are_held_once(tokenizer, model):
    """Finds a learner whose memory grows by an eighth of the vocabulary for each token."""
    constraints = constraints_of(tokenizer, "calls")
    rollouts, _ = drawn_under(tokenizer, model, constraints)
    sets = constraints.sets_of(rollouts)(np.arange(len(rollouts.logprobs_M)))
    assert sets is not None
    different = {(int(begin), int(size)) for begin, size in zip(sets.begin_N, sets.size_N, strict=True)}
    assert len(sets.bytes_X) == sum(size for _, size in different)
    assert len(different) < len(rollouts.logprobs_M) / 3


# --- refusals ---


@pytest.mark.usefixtures("one_rank")
def test_rollouts_of_another_library_or_grammar_are_refused_in_one_line(tokenizer, model):
    """Another version may allow other tokens: finds a learner that would train on wrong probabilities."""
    constraints = constraints_of(tokenizer, "schema")
    rollouts, _ = drawn_under(tokenizer, model, constraints)
    place_M = np.arange(len(rollouts.logprobs_M))

    older = packed_record(GrammarRecord("1.8.7", "00" * 32))
    first_older_BG = rollouts.grammar_BG.copy()
    first_older_BG[0] = np.frombuffer(older, np.uint8)
    words = rf"^rlhf\.constraint: the rollouts followed llguidance 1\.8\.7 and this rank has {library_version()}[^\n]*$"
    with pytest.raises(ArtefactError, match=words):
        constraints.sets_of(replace(rollouts, grammar_BG=first_older_BG))

    others = replace(constraints, constraint_at=lambda position: Constraint.from_json({"choice": ["a", "b"]}))
    with pytest.raises(ArtefactError, match=r"a rollout of prompt \d+ followed another grammar than this rank makes"):
        others.sets_of(rollouts)(place_M)

    tokens_N = rollouts.tokens_N.copy()
    tokens_N[rollouts.prompt_tokens_B[0]] = tokenizer.encode("#")[-1]
    with pytest.raises(ArtefactError, match=r"token 0 of a rollout of prompt 0 is \d+, which its constraint"):
        constraints.sets_of(replace(rollouts, tokens_N=tokens_N))(place_M)

    with pytest.raises(ArtefactError, match="the rollouts were drawn without one"):
        constraints.sets_of(replace(rollouts, grammar_BG=rollouts.grammar_BG[:0]))


def test_records_stay_with_their_rollouts():
    """Finds a selection of rollouts that would compare one's grammar with another's record."""
    records = [packed_record(GrammarRecord("1.9", f"{number:064x}")) for number in range(3)]
    grammar_BG = np.array(bytearray().join(records), np.uint8).reshape(3, -1)
    lengths_B = np.array([1, 2, 3])
    rollouts = Rollouts(
        *(np.arange(12), np.zeros(6, np.float32), lengths_B, lengths_B, np.zeros(3, np.int64), np.zeros(3, np.int64)),
        *(np.arange(3), np.zeros(3, np.int64)),
        grammar_BG=grammar_BG,
    )
    some = rollouts.chosen(np.array([True, False, True]))
    assert [record_G.tobytes() for record_G in some.grammar_BG] == [records[0], records[2]]
    both = concatenated([ScoredRollouts(some, {}), ScoredRollouts(rollouts, {})]).rollouts
    assert [record_G.tobytes() for record_G in both.grammar_BG] == [records[0], records[2], *records]
    assert library_of(both.grammar_BG[0]) == "1.9"


def test_a_constraint_needs_answers_that_may_end():
    """Finds a key that the engine would refuse only after all ranks have started."""
    with pytest.raises(ConfigError, match=r"rlhf\.ignore_eot=True: expected false with rlhf\.constraint=calls"):
        RlhfConfig(constraint="calls", ignore_eot=True)
