"""Measures new tokens per CPU second of answers with a JSON schema, against the same requests without one, on one
thread.

The model is untrained, and its vocabulary is made up of short words. The schema is a list of people that is longer than
an answer, so that every answer has the same number of tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product
from string import ascii_lowercase
from typing import Any, cast

from dist_lm.bench.case import AS_USED, Case, Comparison, GroupSize, configurations
from dist_lm.bench.generate import PROMPT, SAMPLING, SMALLER, engine_options, made_up_tokens
from dist_lm.bench.models import initial_model
from dist_lm.bench.rank import Trial
from dist_lm.config.root import Config
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.engine import Engine
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.request import Answer, Request
from dist_lm.parallel.mesh import World

WITH, WITHOUT = "with a schema", "without"
SHAPE = (
    *(AS_USED, "model=nano", "model.n_heads=4", "model.vocab_size=16384", "model.max_seq_len=512"),
    *("stage.global_batch=32", "stage.seq_len=128"),
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["reader", "writer", "owner"]},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 3},
    },
    "required": ["name", "age", "role", "notes"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 500}
ROUNDS = 5


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns one case: stage.global_batch requests at once with stage.seq_len new tokens each, with and without a
    constraint. Overrides choose other sizes; `quick` changes nothing.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    shape = (*SHAPE, *SMALLER)
    (config,) = configurations([shape], [*shape, *overrides] if overrides else (), quick)
    batch, new = config.stage.global_batch, config.stage.seq_len
    return [
        Case(
            name=f"{config.model.d_model} x {config.model.n_layers} layers, batch {batch}, {PROMPT} + {new} tokens",
            config=config,
            variants=dict.fromkeys((WITH, WITHOUT), GroupSize(1)),
            comparisons=(Comparison(variant=WITH, peer=WITHOUT),),
            rounds=ROUNDS,
        )
    ]


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant, in one process.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    model = initial_model(config).requires_grad_(requires_grad=False)
    batch, new = config.stage.global_batch, config.stage.seq_len
    options, dtype = engine_options(config, world.device, [PROMPT + new] * batch)
    tokenizer = cast(Any, MadeUpTokenizer(config.model.vocab_size))
    engine = Engine(
        model.config,
        dict(model.named_parameters()),
        eot_id=tokenizer.eot_id,
        options=options,
        dtype=dtype,
        device=world.device,
        grammars=Grammars(lambda: tokenizer),
    )
    prompts = made_up_tokens(config, batch, PROMPT).tolist()
    constraint = Constraint.from_json({"json_schema": PEOPLE}) if variant == WITH else None
    # The schema is longer than an answer, so with it end-of-text is never allowed.
    params = replace(SAMPLING, max_new_tokens=new, ignore_eot=variant == WITHOUT)

    def step() -> float:
        for number, prompt in enumerate(prompts):
            engine.submit(Request(str(number), prompt, params, seed=number, constraint=constraint))
        answers = engine.run()
        # A request that was cut short would count as speed.
        assert sum(len(answer.tokens) for answer in answers if isinstance(answer, Answer)) == batch * new, answers[:1]
        return 0.0

    return Trial(step, losses=list, clock=time.process_time)


class MadeUpTokenizer:
    """The part of a `Tokenizer` that constraints need: end-of-text, all bytes, and words of two and three letters."""

    eot_id = 0
    sha256 = "made up"

    def __init__(self, vocab_size: int) -> None:
        words = (bytes(f"{space}{''.join(word)}", "ascii") for word in _words() for space in ("", " "))
        contents = [b"", *(bytes([value]) for value in range(256)), b'", "', b'": "', b'": ', b'"}', b'["', b'"]']
        self._contents = [*contents, *islice(words, max(0, vocab_size - len(contents)))][:vocab_size]
        self.vocab_size = vocab_size

    def vocabulary(self) -> list[bytes]:
        """Returns the bytes of every token."""
        return self._contents

    def encode(self, text: str) -> list[int]:
        """Returns no token: forced text then gets the longest ones."""
        return []

    def content(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes of tokens."""
        return b"".join(self._contents[token] for token in ids)


def _words() -> list[tuple[str, ...]]:
    return [word for length in (2, 3) for word in product(ascii_lowercase, repeat=length)]
