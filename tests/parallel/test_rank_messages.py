"""What ranks send each other arrives as it was sent, and nothing else is read."""

import ast
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dist_lm
from dist_lm.generation.request import Answer, Refusal
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import LENGTH_BYTES, MessageError, all_gather, broadcast, decode, encode
from dist_lm.rlhf.preference_objective import RankingLogprobs
from dist_lm.rlhf.rollouts import Rollouts, ScoredRollouts

# Every call that unpickles bytes of another process.
UNPICKLE = {
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"),
    *("recv_object_list", "_broadcast_object_list", "_object_to_tensor", "_tensor_to_object", "unpickle", "Unpickler"),
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve"}


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    numbers: np.ndarray
    colour: Colour = Colour.RED


@dataclass(frozen=True)
class Outer:
    inner: Inner
    by_number: Mapping[int, Sequence[float]] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"


def same(value: Any, other: Any) -> bool:
    """Whether two values are equal to the bit, with their types."""
    if isinstance(value, np.ndarray):
        return value.dtype == other.dtype and value.shape == other.shape and value.tobytes() == other.tobytes()
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(same, value, other))
    if hasattr(value, "__dataclass_fields__"):
        return type(value) is type(other) and same(vars(value), vars(other))
    return type(value) is type(other) and (value == other or value != value)


LOGPROBS = ((-0.1, float("-inf")), (-1e-300, 0.0))
ANSWER = Answer("7", 0, 3, (1, 2), "a\ud800é\n", *LOGPROBS, "eot", -(2**63), 4, (b"\0\xff",))


def fp32(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


ROLLOUTS = Rollouts(np.arange(3), fp32(0.5, np.nan), *(np.arange(1, 3) for _ in range(6)))
VALUES = [
    (None, str | None),
    ("text", str | None),
    (True, bool),
    (2**70, int),
    (float("nan"), float),
    (Path("/runs/step_00000001"), Path),
    ([Path("a"), Path("b")], list[Path]),
    (({"shard": "ab12"}, None), tuple[dict[str, str], str | None]),
    ({5: ("humaneval", "mbpp"), 10: ()}, dict[int, tuple[str, ...]]),
    ([{"parses": True, "runs": None}], list[dict[str, bool | None]]),
    (np.zeros((0, 3), np.float32), np.ndarray),
    (np.asfortranarray(np.arange(6, dtype=np.uint16).reshape(2, 3)), np.ndarray),
    (np.array(True), np.ndarray),
    ({3: fp32(1, -0.0, np.inf)}, dict[int, np.ndarray]),
    ([ANSWER, Refusal("8", "logits are not numbers")], list[Answer | Refusal]),
    ({1: RankingLogprobs(fp32(1), fp32(2), 0.1, 3.0)}, dict[int, RankingLogprobs]),
    (ScoredRollouts(ROLLOUTS, {"length": np.array([np.nan, 1.0])}, 2), ScoredRollouts),
    (Outer(Inner(np.arange(2)), {2: [0.5]}, "b"), Outer),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=[str(expected) for _, expected in VALUES])
def test_a_value_arrives_to_the_bit(value, expected):
    """It would find a float that is rounded, a key that becomes a text, a dtype or a shape that is lost."""
    assert same(decode(encode(value), expected), value)


class Bomb:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("something was unpickled",)


@pytest.mark.parametrize("expected", [kind for _, kind in VALUES], ids=str)
def test_bytes_that_are_no_such_value_are_refused(expected):
    """It would find a decoder that runs what it reads, trusts a length or a shape, or returns another type."""

    def message(plain: Any, numbers: bytes = b"") -> bytes:
        text = json.dumps(plain).encode()
        return len(text).to_bytes(LENGTH_BYTES, "little") + text + numbers

    hostile = [
        *(b"", b"\0" * 7, b"\xff" * 64, pickle.dumps(Bomb()), message({"a": 1}), message([[[1, 2, 3]]])),
        *(message(["Bomb", {}]), message(["<f4", [10**12], 0]), message(["<f4", [2], -8], b"\0" * 8)),
        *(message(["|O", [1], 0], b"\0" * 8), message(["<f4", [-1], 0], b"\0" * 8)),
        (2**62).to_bytes(LENGTH_BYTES, "little") + b"null,",
        len(b"[" * 10**5).to_bytes(LENGTH_BYTES, "little") + b"[" * 10**5,
    ]
    for content in hostile:
        with pytest.raises(MessageError, match="a rank has sent what is no"):
            decode(content, expected)


def test_random_changes_of_a_message_are_read_as_the_type_or_refused():
    content = encode(VALUES[-2][0])
    random = np.random.default_rng(0)
    for _ in range(500):
        changed = bytearray(content[: random.integers(len(content) + 1)])
        for place in random.integers(max(1, len(changed)), size=min(3, len(changed))):
            changed[place] = random.integers(256)
        try:
            assert isinstance(decode(bytes(changed), ScoredRollouts), ScoredRollouts)
        except MessageError:
            continue


def exchanged(world: World) -> list[Any]:
    """What two ranks send each other, messages of different lengths too."""
    text = "x" * (1000 * world.rank)
    gathered = all_gather({world.rank: np.full(world.rank, 7)}, dict[int, np.ndarray])
    assert [list(part) for part in gathered] == [[0], [1]]
    assert same(gathered[1][1], np.full(1, 7))
    assert all_gather(text, str) == ["", "x" * 1000]
    assert broadcast(text if world.rank else "first", str) == "first"

    # bytes of a rank that is none, in place of its message
    size = torch.tensor([3], dtype=torch.int64)
    if world.is_first:
        dist.broadcast(size, 0)
        dist.broadcast(torch.zeros(3, dtype=torch.uint8), 0)
        return [True]
    with pytest.raises(MessageError):
        broadcast(None, dict[str, int])
    return [True]


@pytest.mark.cluster
def test_ranks_exchange_values(ranks):
    """Finds a message cut to the length of another rank's, and bytes of no message that are read as one."""
    assert ranks.run(2, exchanged) == [True]


def test_nothing_of_ours_unpickles_what_another_process_sends():
    """Finds a call that runs what another process sends. torch's checkpoint planner and Ray unpickle inside their own
    packages; docs/security.md says what guards them."""
    texts = {path: path.read_text() for path in Path(dist_lm.__file__).parent.rglob("*.py")}

    calls = []
    for path, text in texts.items():
        # A file without any of the names need not be parsed, which takes most of the time.
        if not any(name in text for name in UNPICKLE | PICKLES):
            continue
        for node in ast.walk(ast.parse(text)):
            names: set[str] = set()
            if isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.Name):
                names = {node.id}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            calls += [(str(path), name) for name in names & (UNPICKLE | PICKLES)]
    assert not calls

    # torch.load unpickles unless it is told not to, and numpy with allow_pickle
    for path, text in texts.items():
        assert "torch.load(" not in text, path
        assert "allow_pickle=True" not in text, path
