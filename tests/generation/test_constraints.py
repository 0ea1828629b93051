"""Answers with a constraint: what ends by itself fulfils it, in any batch, and other requests stay as they are."""

import json
import re
import time
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.errors import ConfigError
from dist_lm.generation.constraint import MOST_BYTES, Constraint
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.request import Answer, Refusal, Request, RequestError, SamplingParams
from dist_lm.generation.schema_keywords import NOTES, PLAIN, SchemaError, check_schema, is_plainly_valid
from dist_lm.model.transformer import Transformer
from dist_lm.sandbox import limited
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.generation.random_schemas import SCHEMAS

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS: list[dict[str, Any]] = [
    {"json_schema": PERSON},
    {"regex": "[0-9]{4}-(0[1-9]|1[0-2])"},
    {"choice": ["yes", "no", 'say "no"\n']},
    {"lark": 'start: "a" b "c"\nb: /[x-z]{2}/'},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_work: WorkDirectory) -> Tokenizer:
    return Tokenizer.load(tiny_work.tokenizer_model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(lambda: tokenizer)


def engine_of(
    model: Transformer,
    tokenizer: Tokenizer,
    grammars: Grammars | None,
    cache_tokens: int = 2048,
    piece_tokens: int = 256,
) -> Engine:
    return Engine(
        model.config,
        dict(model.named_parameters()),
        eot_id=tokenizer.eot_id,
        vocabulary=tokenizer.vocabulary(),
        options=EngineOptions(cache_tokens, page_tokens=16, max_sequences=16, piece_tokens=piece_tokens),
        grammars=grammars,
    )


@pytest.fixture(scope="module")
def engine(small_model: Transformer, tokenizer: Tokenizer, grammars: Grammars) -> Engine:
    return engine_of(small_model, tokenizer, grammars)


def request(name: str, constraint: Any, tokenizer: Tokenizer, seed: int = 0, **params: Any) -> Request:
    params = {"max_new_tokens": 100} | params
    made = Constraint.from_json(constraint) if constraint else None
    prompt = tokenizer.encode_prompt("A value: ")
    return Request(name, prompt, SamplingParams(**params), seed, constraint=made)


def answers_of(engine: Engine, *requests: Request) -> dict[str, Answer]:
    for each in requests:
        engine.submit(each)
    results = engine.run()
    assert not [result for result in results if isinstance(result, Refusal)], results
    return {result.request: result for result in results if isinstance(result, Answer)}


def fulfils(text: str, constraint: dict[str, Any]) -> bool:
    ((kind, value),) = constraint.items()
    if kind == "json_schema":
        jsonschema.validate(json.loads(text), value)
        return True
    if kind == "choice":
        return text in value
    return re.fullmatch(value if kind == "regex" else "a[x-z]{2}c", text) is not None


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: next(iter(constraint)))
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 5.0}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_an_answer_that_ends_by_itself_fulfils_its_constraint(engine, tokenizer, constraint, params):
    """The model has learned nothing, and at temperature 5 it draws nearly any token."""
    answers = answers_of(engine, *(request(str(seed), constraint, tokenizer, seed, **params) for seed in range(8)))
    ended = [answer for answer in answers.values() if answer.finish == "eot"]
    assert len(ended) >= 6
    assert all(fulfils(answer.text, constraint) for answer in ended)
    for answer in answers.values():
        assert answer.finish in ("eot", "length")
        assert tokenizer.content(answer.tokens).decode(errors="replace").startswith(answer.text)


@pytest.mark.heavy
def test_an_answer_does_not_depend_on_its_batch(small_model, engine, tokenizer, grammars):
    """Finds masks of one sequence that reach another, and matchers that a preemption leaves behind."""
    requests = [
        request(f"{number}", [*CONSTRAINTS, None][number % 5], tokenizer, number, max_new_tokens=60)
        for number in range(15)
    ]
    together = answers_of(engine, *requests)
    small = engine_of(small_model, tokenizer, grammars, cache_tokens=240)
    crowded = answers_of(small, *reversed(requests))
    for each in requests:
        alone = answers_of(engine, each)[each.id]
        assert together[each.id] == crowded[each.id] == alone


FORCED = {
    "regex": '\\{"the only key of this object": [0-9], "another one": "(yes|no)"\\} and an end that nobody chooses'
}


@pytest.mark.heavy
@pytest.mark.parametrize("piece_tokens", [256, 4])
def test_tokens_without_a_choice_are_taken_without_a_pass_of_the_model(
    small_model, tokenizer, grammars, monkeypatch, piece_tokens
):
    """The same answers with fewer passes: finds positions, pages or log-probabilities of such tokens that are off."""
    constraints = [FORCED, *CONSTRAINTS]
    requests = [
        replace(request(f"{n}", constraints[n % 5], tokenizer, n, max_new_tokens=60), keep_sets=True, n=1 + n % 2)
        for n in range(15)
    ]
    results, passes = [], []
    for taken, cache_tokens in ((True, 2048), (True, 240), (False, 2048)):
        engine = engine_of(small_model, tokenizer, grammars, cache_tokens, piece_tokens)
        if not taken:
            monkeypatch.setattr("dist_lm.generation.engine.only_token", lambda allowed: None)
        for each in requests:
            engine.submit(each)
        n_steps, answers = 0, dict[tuple[str, int], Answer]()
        while engine.busy:
            n_steps += 1
            answers |= {(each.request, each.index): each for each in engine.step() if isinstance(each, Answer)}
        results.append(answers)
        passes.append(n_steps)

    together, crowded, one_by_one = results
    assert together == crowded
    assert together.keys() == one_by_one.keys()
    assert len(together) == 22
    assert passes[0] < 0.7 * passes[2] or piece_tokens < 256
    for key, answer in together.items():
        other = one_by_one[key]
        assert (answer.tokens, answer.finish, answer.text) == (other.tokens, other.finish, other.text)
        assert answer.sets == other.sets
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert answer.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-5)


@pytest.mark.heavy
def test_a_model_on_two_devices_takes_the_same_tokens(small_model, engine, tokenizer, grammars):
    """Finds a rank that does not compute the tokens that the first one took."""
    requests = [request(f"{n}", [FORCED, *CONSTRAINTS][n % 5], tokenizer, n, max_new_tokens=60) for n in range(5)]
    alone = answers_of(engine, *requests)
    weights, options = dict(small_model.named_parameters()), EngineOptions(2048, page_tokens=16)
    with Engine(
        small_model.config,
        weights,
        eot_id=tokenizer.eot_id,
        vocabulary=tokenizer.vocabulary(),
        options=options,
        tp=2,
        grammars=grammars,
    ) as sharded:
        together = answers_of(sharded, *requests)
    for each in requests:
        assert together[each.id].tokens == alone[each.id].tokens
        assert together[each.id].raw_logprobs == pytest.approx(alone[each.id].raw_logprobs, abs=1e-5)


def test_a_request_cancelled_in_the_middle_of_forced_text_ends_with_what_it_has(engine, tokenizer):
    """Finds a sequence that goes on, or keeps its pages, because the engine still owes it a pass."""
    shown: list[int] = []

    def cancel_at_third(name: str, index: int, token: int, text: str) -> None:
        shown.append(token)
        if len(shown) == 3:
            engine.cancel(name)

    engine.submit(request("ends", FORCED, tokenizer), cancel_at_third)
    (answer,) = engine.run()
    assert answer.finish == "cancelled"
    assert list(answer.tokens) == shown
    assert len(answer.raw_logprobs) == len(shown)
    assert answers_of(engine, request("next", FORCED, tokenizer))["next"].finish == "eot"


def test_log_probabilities_and_sets_are_those_of_what_was_allowed(engine, tokenizer):
    """Finds a learner that would divide by the probability of tokens that could not be drawn."""
    made = replace(request("sets", {"choice": ["yes", "no"]}, tokenizer), keep_sets=True)
    answer = answers_of(engine, made)["sets"]
    beginnings = {b"y", b"ye", b"yes", b"n", b"no"}
    may_begin = {token for token, content in enumerate(tokenizer.vocabulary()) if content in beginnings}
    assert ids_of(answer.sets[0], tokenizer.vocab_size) == may_begin

    # Behind the text only its end is allowed.
    assert ids_of(answer.sets[-1], tokenizer.vocab_size) == {tokenizer.eot_id} == {answer.tokens[-1]}
    assert answer.logprobs[-1] == 0.0
    assert all(raw <= drawn + 1e-5 for raw, drawn in zip(answer.raw_logprobs, answer.logprobs, strict=True))


def ids_of(token_set: bytes, vocab_size: int) -> set[int]:
    """The tokens of a packed set."""
    content = np.frombuffer(token_set, np.uint8)
    if len(content) == -(-vocab_size // 8):
        return set(np.flatnonzero(np.unpackbits(content, bitorder="little")).tolist())
    return set(content.view("<u2").tolist())


def test_tokens_that_end_an_answer_are_drawn_only_where_it_may_end(engine, tokenizer):
    """Finds a stop token that cuts off a value, such as the end of a turn."""
    digit = tokenizer.encode("7")[-1]
    ends = (digit, tokenizer.special_ids["<|im_end|>"])
    for seed in range(6):
        answer = answers_of(engine, request("stops", {"regex": "[0-9]{6}"}, tokenizer, seed, stop_tokens=ends))["stops"]
        assert answer.finish in ("eot", "stop")
        assert re.fullmatch("[0-9]{6}7?", answer.text)
        assert not {*ends, tokenizer.eot_id} & {*answer.tokens[:-1]}


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_what_cannot_be_fulfilled_is_refused_and_others_go_on(engine, tokenizer, params):
    """A bias forbids the only tokens that the constraint allows: finds an answer that breaks it."""
    forbidden = dict.fromkeys(range(tokenizer.vocab_size), float("-inf"))
    engine.submit(request("none", {"choice": ["yes"]}, tokenizer, logit_bias=forbidden, **params))
    engine.submit(request("some", {"choice": ["yes"]}, tokenizer))
    results = {result.request: result for result in engine.run()}
    assert isinstance(results["none"], Refusal)
    assert isinstance(results["some"], Answer)
    assert results["some"].text == "yes"


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"regex": "(a"}, "constraint.regex: "),
        ({"lark": "start: nothing"}, "constraint.lark: "),
        ({"json_schema": {"type": "object", "minProperty": 1}}, "#/minProperty: this keyword is not supported"),
        ({"json_schema": {"properties": {"a": {"not": {}}}}}, "#/properties/a/not: this keyword is not supported"),
        ({"json_schema": {"$ref": "https://example.com/x.json"}}, "#/$ref: .* lies outside the schema"),
        ({"json_schema": {"type": "string", "format": "iri"}}, "#/format: 'iri' is not supported"),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "#/oneOf: more than one branch"),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "constraint.json_schema: "),
        ({"json_schema": {"const": {"a": [-(2**63)]}}}, r"#/const: -9.223e\+18; expected numbers of at most 9e\+18"),
        ({"json_schema": {"type": "number", "maximum": 1e300}}, r"#/maximum: 1e\+300; expected numbers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_constraint_that_cannot_be_followed_is_refused_by_name(engine, tokenizer, constraint, words):
    with pytest.raises(RequestError, match=f"^request bad: {words.replace('$', '[$]')}"):
        engine.submit(request("bad", constraint, tokenizer))
    assert not engine.busy


VALUES = st.one_of(
    *(st.integers(-2, 3), st.floats(allow_nan=False), st.none(), st.booleans()),
    *(
        st.sampled_from(["string", "object", "date", ""]),
        st.lists(st.sampled_from(["a", "b", "string", 1]), max_size=3),
    ),
)


@pytest.mark.heavy
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(PLAIN | NOTES - {"$defs", "definitions"})), VALUES, max_size=4))
def test_what_is_plainly_valid_is_valid(schema):
    """Finds a shortcut that lets a schema pass which the rules for schemas refuse."""
    if is_plainly_valid(schema):
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.heavy
def test_what_ends_the_library_is_one_refused_request(small_model, tokenizer, monkeypatch):
    """The constraint of a stranger must not end the process of an engine that answers others."""
    engine = engine_of(small_model, tokenizer, Grammars(lambda: tokenizer, untrusted=True))
    assert answers_of(engine, request("fits", {"choice": ["yes"]}, tokenizer))["fits"].text == "yes"

    # Its automaton has a state for each remainder, which takes gigabytes.
    monkeypatch.setattr(limited, "ANSWER_S", 2.0)
    bomb = {"lark": 'start: %json {"type": "integer", "multipleOf": 2147483648}'}
    with pytest.raises(RequestError, match=r"constraint\.lark: compiling it takes more than"):
        engine.submit(request("bomb", bomb, tokenizer))
    monkeypatch.undo()
    with pytest.raises(RequestError, match="#/minProperty: this keyword is not supported"):
        engine.submit(request("bad", {"json_schema": {"type": "object", "minProperty": 1}}, tokenizer))
    assert answers_of(engine, request("fits", {"choice": ["no"]}, tokenizer))["fits"].text == "no"


@pytest.mark.bars
def test_a_large_schema_is_compiled_in_milliseconds(tokenizer):
    """20 KB: 25 ms at first, 1 ms when it is known. CPU time of this thread, the best of five."""
    schema = {f"key_{n}": {"type": "string", "maxLength": n % 50, "description": "d" * 60} for n in range(160)}
    first, again = [], []
    for number in range(5):
        grammars = Grammars(lambda: tokenizer)
        grammars.prepare(Constraint.from_json({"choice": ["a"]}))
        large = Constraint.from_json({"json_schema": {"type": "object", "properties": schema, "title": str(number)}})
        assert 20_000 < len(large.text) < 25_000
        for seconds in (first, again):
            begin = time.thread_time()
            grammars.matcher(large, ()).allowed()
            seconds.append(time.thread_time() - begin)
    print(f"{min(first):.4f} s, then {min(again):.6f} s")
    assert min(first) < 0.025
    assert min(again) < 0.001


def test_an_engine_without_a_tokenizer_refuses_constraints(small_model, tokenizer):
    with pytest.raises(RequestError, match="has no tokenizer"):
        engine_of(small_model, tokenizer, None).submit(request("a", CONSTRAINTS[1], tokenizer))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "yes",
        {},
        {"schema": {}},
        {"regex": "a", "choice": ["b"]},
        {"choice": []},
        {"choice": "ab"},
        {"choice": [1]},
        {"regex": ""},
        {"json_schema": 3},
        {"regex": "a" * MOST_BYTES + "a"},
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_constraint_of_another_form_is_refused(value):
    with pytest.raises(ConfigError, match=r"^constraint"):
        Constraint.from_json(value)


@pytest.mark.parametrize(
    "branches",
    [
        [{"type": "string"}, {"type": ["integer", "null"]}],
        [
            {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]},
        ],
        [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
    ],
)
def test_branches_that_exclude_each_other_may_stand_under_one_of(branches):
    """pydantic writes unions with a discriminator so."""
    variant = {"type": "object", "required": ["kind"]}
    definitions = {
        "A": variant | {"properties": {"kind": {"const": "a"}}},
        "B": variant | {"properties": {"kind": {"const": "b"}}},
    }
    check_schema({"oneOf": branches, "$defs": definitions})
    with pytest.raises(SchemaError, match="oneOf"):
        check_schema({"oneOf": [*branches, {}], "$defs": definitions})


@pytest.mark.heavy
@pytest.mark.parametrize("n_schemas", [40, pytest.param(1000, marks=pytest.mark.bars)])
def test_answers_to_random_schemas_are_valid(engine, tokenizer, n_schemas):
    """An answer that ends by itself is valid; few are cut by their length, and few schemas are refused, by name."""
    counts = dict.fromkeys(("answered", "cut", "refused"), 0)

    @settings(max_examples=n_schemas, deadline=None, database=None, derandomize=True)
    @given(SCHEMAS)
    def check(schema: Any) -> None:
        made = request("random", {"json_schema": schema}, tokenizer, seed=len(str(schema)), max_new_tokens=200)
        try:
            engine.submit(made)
        except RequestError as error:
            counts["refused"] += 1
            assert re.search(r"constraint\.json_schema: .|: #", str(error))  # noqa: PT017  most are not refused
            return
        (answer,) = engine.run()
        assert isinstance(answer, Answer), answer
        if answer.finish == "eot":
            counts["answered"] += 1
            jsonschema.validate(json.loads(answer.text), schema)
        else:
            counts["cut"] += 1

    check()
    print(counts)
    assert counts["cut"] <= 0.02 * counts["answered"] + 1
    assert counts["refused"] <= 0.2 * sum(counts.values())
