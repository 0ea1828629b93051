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
