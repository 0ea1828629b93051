"""Reward functions of the toys. Their process imports this file, so it imports nothing heavy."""

import math
import os
import time

VOCABULARY = 64
FIRST = 0x100  # character of token 0


def share_of_low_tokens(prompt: str, completion: str) -> float:
    """How many of the tokens are of the lower third."""
    return sum(ord(character) - FIRST < VOCABULARY // 3 for character in completion) / len(completion)


def words_in_common(prompt: str, completion: str) -> float:
    return len(set(prompt.split()) & set(completion.split()))


def by_order(prompt: str, completion: str) -> object:
    """What the completion orders."""
    match completion.split():
        case ["number", number]:
            return float(number)
        case ["print", number]:
            print('{"value": 9.0}')
            return int(number)
        case ["raise"]:
            return 1 / 0
        case ["exit"]:
            raise SystemExit("no more")
        case ["nothing"]:
            return None
        case ["text"]:
            return "1.0"
        case ["nan"]:
            return math.nan
        case ["die"]:
            os._exit(3)
        case ["process"]:
            return os.getpid()
        case ["hang"]:
            time.sleep(600)
    raise AssertionError(completion)


def fails_on_low_starts(prompt: str, completion: str) -> float:
    """No score where the first token is of the lower quarter, else a tenth a token."""
    if ord(completion[0]) - FIRST < VOCABULARY // 4:
        raise ValueError("a low token at the start")
    return len(completion) / 10


def one(prompt: str, completion: str) -> float:
    return 1.0


def fails_on_a_fifth(prompt: str, completion: str) -> float:
    """No score for about a fifth of all completions."""
    if sum(completion.encode()) % 5 == 0:
        raise ValueError("one of a fifth")
    return float(len(completion) % 3)


# --- the forms of other libraries ---


def matches_row(request: str, completion: str, row: dict) -> float | None:
    """1 where the completion is the row's answer; rows without one have no score."""
    if row.get("answer") is None:
        return None
    return float(completion == row["answer"])


def counts_turns(request: str, completion: str, *, messages: list) -> float:
    return float(len(messages))


def trl_matches(completions: list, solution: list, **kwargs: object) -> list[float | None]:
    """As trl.rewards.accuracy_reward: None where the row has no solution."""
    texts = [completion[0]["content"] for completion in completions]
    return [None if right is None else float(text == right) for text, right in zip(texts, solution, strict=True)]


def trl_sizes(prompts: list, completions: list, **columns: list) -> list[float]:
    """The number of completions of the call; fails, hangs or ends where a completion says so."""
    if "raise" in completions:
        raise ValueError("one of them")
    if "die" in completions:
        os._exit(3)
    if "hang" in completions:
        time.sleep(600)
    if "short" in completions:
        return [1.0]
    return [math.nan if text == "nan" else float(len(prompts)) for text in completions]


async def trl_async(completions: list, completion_ids: list, **kwargs: object) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def verl_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> dict:
    assert extra_info is not None
    return {"score": float(solution_str == ground_truth), "source": data_source, "index": extra_info.get("index")}


def verl_scores(data_sources: list, solution_strs: list, ground_truths: list, extra_infos: list) -> list[float]:
    assert len(data_sources) == len(extra_infos)
    return [float(text == right) for text, right in zip(solution_strs, ground_truths, strict=True)]


def openrlhf_reward(queries: list, prompts: list, labels: list) -> list[float]:
    return [0.0 for _ in queries]
