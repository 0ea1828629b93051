"""Checks what an environment returned, and writes the values of the protocol as JSON.

Whatever an environment returns passes `checked_observation` or `checked_step`, also when its process has checked it:
the process may be broken.
"""

import json
from collections.abc import Mapping
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.message_values import message_of, message_value
from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message, Tool, check_conversation
from dist_lm.environments.protocol import (
    FAILURES,
    Action,
    BadRewardError,
    EnvironmentFailedError,
    Observation,
    Step,
    Task,
    Verdict,
    finite,
)

# --- checks ---


def checked_observation(observation: Any, most_bytes: int) -> Observation:
    """Returns the observation of `reset`: a conversation whose next turn is the model's.

    Raises:
        EnvironmentFailedError: it is none (`bad_step`, `bad_observation`), or has more bytes as JSON (`too_long`).
    """
    if type(observation) is not Observation:
        raise EnvironmentFailedError("bad_step", f"reset returned {_named(observation)}; expected an Observation")

    if observation.begins_anew is not False:
        raise EnvironmentFailedError("bad_observation", "begins_anew from reset: a conversation begins there anyway")

    _check_opening(observation, "reset")
    _check_size(observation, most_bytes)
    return observation


def checked_step(step: Any, action: Action, most_bytes: int) -> Step:
    """Returns the step that follows an action: with a verdict if it is the last one, else with turns that the model can
    go on from.

    Raises:
        EnvironmentFailedError: the type of a part is wrong (`bad_step`), the turns fit no conversation
            (`bad_observation`), they have more bytes as JSON (`too_long`), a reward is not finite (`bad_reward`), or
            the last step has no verdict (`no_verdict`).
    """
    if type(step) is not Step:
        raise EnvironmentFailedError("bad_step", f"step returned {_named(step)}; expected a Step")
    if type(step.observation) is not Observation:
        raise EnvironmentFailedError(
            "bad_step", f"the step's observation is {_named(step.observation)}; expected an Observation"
        )
    if type(step.done) is not bool:
        raise EnvironmentFailedError("bad_step", f"the step's done is {_named(step.done)}; expected True or False")
    try:
        turn_reward = finite(step.turn_reward)
    except BadRewardError as error:
        raise EnvironmentFailedError("bad_reward", str(error)) from None

    if not step.done:
        if action.cut:
            raise EnvironmentFailedError("no_verdict", f"the conversation was cut ({action.cut}), and step is not done")
        if step.verdict is not None:
            raise EnvironmentFailedError("bad_step", "a verdict before the last step")
        _check_goes_on(step.observation, action)
    elif type(step.verdict) is not Verdict:
        raise EnvironmentFailedError("no_verdict", f"the last step has {_named(step.verdict)} as its verdict")
    elif not step.verdict.is_sound:
        raise EnvironmentFailedError("bad_reward", f"a verdict with {step.verdict.reward!r:.100}")
    elif step.observation.messages:
        _check_goes_on(step.observation, action)

    if step.observation.tools and not step.observation.begins_anew:
        raise EnvironmentFailedError("bad_observation", "tools in a step that does not begin the conversation anew")
    _check_size(step.observation, most_bytes)
    return Step(step.observation, step.done, step.verdict, turn_reward)


def _check_goes_on(observation: Observation, action: Action) -> None:
    """Refuses turns after which the model cannot draw its next one.

    Raises:
        EnvironmentFailedError: `bad_observation`, with what is wrong in the turns or in `begins_anew`.
    """
    if type(observation.begins_anew) is not bool:
        named = _named(observation.begins_anew)
        raise EnvironmentFailedError("bad_observation", f"begins_anew is {named}; expected True or False")
    if observation.begins_anew:
        _check_opening(observation, "a step that begins anew")
    else:
        _check_follows(observation, action)


def _check_opening(observation: Observation, source: str) -> None:
    """Refuses turns, with their tools, that are no conversation whose next turn is the model's."""
    _check_turns(observation.messages, observation.tools)
    if observation.messages[-1].role not in ("user", "tool"):
        raise EnvironmentFailedError("bad_observation", f"the last turn of {source} is not of user or tool")


def _check_follows(observation: Observation, action: Action) -> None:
    """Refuses turns that cannot follow an action; accepted are results for each call, or a turn of the user.

    Raises:
        EnvironmentFailedError: `bad_observation`: there are no turns, a turn is of another role, or they do not answer
            the calls.
    """
    for message in observation.messages if type(observation.messages) is tuple else ():
        if not isinstance(message, Message) or message.role not in ("user", "tool"):
            raise EnvironmentFailedError("bad_observation", "a step has a turn that is not of user or tool")
    if not observation.messages:
        raise EnvironmentFailedError("bad_observation", "a step that is not the last one has no turns")

    # A short conversation stands for all turns so far: only the last turn decides what may follow.
    model_turn = Message("assistant", action.text or ("" if action.calls else "."), calls=action.calls)
    _check_turns((Message("user", "."), model_turn), (), observation.messages)


def _check_turns(messages: Any, tools: Any, following: Any = ()) -> None:
    try:
        if type(messages) is not tuple or type(following) is not tuple:
            raise ChatError(
                f"messages: {_named(following or messages)}; expected a tuple of {Message.__module__}.Message"
            )
        check_conversation(Conversation((*messages, *following), tools))
    except ChatError as error:
        raise EnvironmentFailedError("bad_observation", str(error)) from None


def _check_size(observation: Observation, most_bytes: int) -> None:
    try:
        size = len(json_text.write(observation_value(observation), "observation").encode())
    except ChatError as error:
        raise EnvironmentFailedError("bad_observation", str(error)) from None
    if size > most_bytes:
        raise EnvironmentFailedError("too_long", f"an observation of {size:,} bytes; at most {most_bytes:,}")


def _named(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# --- JSON ---


def task_value(task: Task) -> dict[str, Json]:
    return {"key": task.key, "text": task.text, "digest": task.digest}


def action_value(action: Action) -> dict[str, Json]:
    calls = [[call.name, call.arguments] for call in action.calls]
    return {"text": action.text, "calls": calls, "cut": action.cut}


def action_of(value: Mapping[str, Json]) -> Action:
    return Action(value["text"], tuple(Call(*call) for call in value["calls"]), value["cut"])


def observation_value(observation: Observation) -> dict[str, Json]:
    value: dict[str, Json] = {
        "messages": [message_value(message) for message in observation.messages],
        "tools": [[tool.name, tool.description, tool.parameters] for tool in observation.tools],
    }
    # Written only where it says something, so that records without it stay as they are.
    if observation.begins_anew:
        value["begins_anew"] = True
    return value


def observation_of(value: Any) -> Observation:
    """Returns the observation of a value, which `checked_observation` or `checked_step` has to check.

    Raises:
        EnvironmentFailedError: the value has another form (`bad_message`).
    """
    try:
        messages = tuple(message_of(turn) for turn in value["messages"])
        tools = tuple(Tool(*fields) for fields in value["tools"])
        return Observation(messages, tools, value.get("begins_anew", False))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvironmentFailedError("bad_message", f"no observation: {type(error).__name__}: {error}") from None


def step_value(step: Step) -> dict[str, Json]:
    """Returns a step that `checked_step` has accepted."""
    verdict = None
    if step.verdict:
        verdict = [step.verdict.reward, step.verdict.valid, step.verdict.failure_reason, step.verdict.detail]
    observation = observation_value(step.observation)
    return {"observation": observation, "done": step.done, "verdict": verdict, "turn_reward": step.turn_reward}


def step_of(value: Any) -> Step:
    """Returns the step of a value, which `checked_step` has to check.

    Raises:
        EnvironmentFailedError: the value has another form (`bad_message`), or a reward is no number (`bad_reward`).
    """
    try:
        observation, done = observation_of(value["observation"]), value["done"]
        verdict = None
        if value["verdict"] is not None:
            reward, is_valid, reason, detail = value["verdict"]
            # JSON writes 1.0 as 1 in some languages.
            verdict = Verdict(float(reward) if type(reward) is int else reward, is_valid, reason, str(detail))
        return Step(observation, done, verdict, value["turn_reward"])
    except BadRewardError as error:
        raise EnvironmentFailedError("bad_reward", str(error)) from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EnvironmentFailedError("bad_message", f"no step: {type(error).__name__}: {error}") from None


def failure_of(value: Any) -> EnvironmentFailedError:
    """Returns the failure in a message of an environment's process; anything else is a `bad_message`."""
    if isinstance(value, list) and len(value) == 2 and value[0] in FAILURES:
        return EnvironmentFailedError(value[0], str(value[1]))
    return EnvironmentFailedError("bad_message", f"no failure: {json.dumps(value)[:100]}")
