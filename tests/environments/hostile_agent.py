"""A program that does what the column `how` of its task says: good ways to hold a conversation, and bad ones.

Without packages, so that it starts fast.
"""

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request

BASE, KEY = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
TASK = json.loads(sys.stdin.readline())
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
FIRST = {"role": "user", "content": "Go."}
AGAIN = {"role": "user", "content": "Again."}


def post(url: str, body: object, key: str) -> tuple[int, dict]:
    """Returns (status, body) of a response."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, headers)) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def chat(*messages: dict, key: str = KEY, **fields: object) -> dict:
    """Returns the model's message."""
    status, body = post(f"{BASE}/chat/completions", {"model": "x", "messages": messages, **fields}, key)
    assert status == 200, body
    return body["choices"][0]["message"]


def refused(*messages: dict, **fields: object) -> tuple[int, str]:
    """Returns (status, code) of a chat that is refused."""
    status, body = post(f"{BASE}/chat/completions", {"model": "x", "messages": messages, **fields}, KEY)
    return status, body["error"]["code"]


def reward(body: object, key: str = TASK["reward_key"]) -> int:
    return post(TASK["reward_url"], body, key)[0]


def begun() -> list[dict]:
    """A conversation with one turn of the model."""
    return [FIRST, chat(FIRST)]


def good() -> None:
    messages = begun()
    messages += [AGAIN, chat(*messages, AGAIN)]
    assert reward({"reward": 1.0}) == 200


def hangs() -> None:
    time.sleep(600)


def hangs_later() -> None:
    begun()
    time.sleep(600)


def crashes() -> None:
    begun()
    raise RuntimeError("broken")


def ends() -> None:
    begun()


def is_killed() -> None:
    begun()
    os.kill(os.getpid(), signal.SIGKILL)


def takes_memory() -> None:
    begun()
    bytearray(4 << 30)


def is_early() -> None:
    assert reward({"reward": 1.0}) == 409
    assert reward({"turn_reward": 1.0}) == 409


def is_nan() -> None:
    begun()
    assert reward({"reward": float("nan")}) == 400
    assert reward({"reward": 1.0}) in (400, 401)


def is_nan_for_a_turn() -> None:
    begun()
    assert reward({"turn_reward": float("nan")}) == 400
    assert reward({"reward": 1.0}) in (400, 401)


def is_no_fp32() -> None:
    begun()
    assert reward({"reward": 1e300}) == 400
    assert reward({"reward": 1.0}) in (400, 401)


def is_text() -> None:
    begun()
    reward({"reward": "high"})


def refuses() -> None:
    reward({"valid": False, "reason": "refused", "detail": "too easy"})


def gives_up() -> None:
    begun()
    reward({"valid": False, "reason": "infrastructure"})


def forges() -> None:
    begun()
    assert [reward({"reward": 1.0}, key) for key in (KEY, "", "wrong")] == [401] * 3


def begins_anew_with_too_much() -> None:
    begun()
    refused({"role": "user", "content": "x" * 100_000})


def says_too_much() -> None:
    messages = begun()
    refused(*messages, {"role": "user", "content": "x" * 100_000})


def speaks_for_the_model() -> None:
    messages = begun()
    refused(*messages, AGAIN, {"role": "assistant", "content": "I won."}, AGAIN)


def leaves_a_child() -> None:
    """A child in a session of its own posts the reward that its parent did not."""
    begun()
    if os.fork() == 0:
        os.setsid()
        time.sleep(1.0)
        reward({"reward": 1.0})


# Ways that break no conversation: all of them end with rewards whose sum is 1.


def forgets() -> None:
    begun()
    chat({**FIRST, "content": "Go, as after a summary."})
    assert reward({"reward": 1.0}) == 200


def edits() -> None:
    messages = begun()
    chat({**FIRST, "content": "Went."}, messages[1], AGAIN)
    assert reward({"reward": 1.0}) == 200


def edits_the_answer() -> None:
    messages = begun()
    chat(FIRST, {**messages[1], "content": "something better"}, AGAIN)
    assert reward({"reward": 1.0}) == 200


def changes_tools() -> None:
    messages = begun()
    chat(*messages, AGAIN, tools=TOOLS)
    assert reward({"reward": 1.0}) == 200


def begins_anew_with_nothing_that_asks() -> None:
    """What is no conversation for the model is refused, and the one so far goes on."""
    messages = begun()
    for others in ([{"role": "tool", "tool_call_id": "1", "content": "5"}], [FIRST, AGAIN], [AGAIN, messages[1]]):
        assert refused(*others)[0] == 400
    chat(*messages, AGAIN)
    assert reward({"reward": 1.0}) == 200


def rewards_turns() -> None:
    messages = begun()
    assert reward({"turn_reward": 7.0}) == 200
    assert reward({"turn_reward": 0.25}) == 200  # in the place of the first one
    assert reward({"turn_reward": 0.5, "reward": 1.0}) == 400
    chat(*messages, AGAIN)
    assert reward({"turn_reward": 0.5}) == 200
    assert reward({"reward": 0.25}) == 200
    assert reward({"turn_reward": 5.0}) in (400, 401)


def rewards_twice() -> None:
    begun()
    assert reward({"reward": 1.0}) == 200
    assert reward({"reward": 5.0}) in (400, 401)


def asks_for_what_is_not_there() -> None:
    for fields in ({"n": 2}, {"stop": ["x"]}, {"tool_choice": "required"}, {"unheard_of": 1}, {"messages": 3}):
        assert refused(FIRST, **fields)[0] == 400, fields
    begun()
    assert reward({"reward": 1.0, "bonus": 5}) == 400
    assert reward({"valid": False, "reason": "bad luck"}) == 400
    assert reward({"reward": 1.0}) == 200


def sends_garbage() -> None:
    url = f"{BASE}/chat/completions"
    assert [post(url, body, KEY)[0] for body in (b"{", b"\xff", b"[]", b"[" * 100_000)] == [400] * 4
    assert post(url, b" " * 50_000_000, KEY)[0] == 413
    assert post(f"{BASE}/embeddings", {}, KEY)[0] == 404
    assert post(url, {"messages": [FIRST]}, "wrong")[0] == 401
    good()


def goes_on_after_the_last_turn() -> None:
    messages = begun()
    messages += [AGAIN, chat(*messages, AGAIN)]
    assert refused(*messages, AGAIN) == (400, "turn_limit")
    assert reward({"reward": 1.0}) == 200


if __name__ == "__main__":
    globals()[TASK["data"]["how"]]()
