"""The kinds of conversations, from the request to the answer.

An episode takes its tools from the scene and returns the turns. Results are the return values of the tools.
"""

import random
from collections.abc import Callable

from dist_lm.chat.messages import Call, Json, Message
from dist_lm.tools.data.actions import BY_KEY
from dist_lm.tools.data.catalogue import Specification, Topic
from dist_lm.tools.data.phrasing import (
    Given,
    answer,
    describe,
    instruction,
    nothing_fits,
    piece,
    question_back,
    request,
    shown,
)
from dist_lm.tools.data.scene import Scene, ToolFailure, call_of, record_of, with_record
from dist_lm.tools.data.words import upper_first

Turns = list[Message]
ROUND = 4  # turns of a request with one call: request, call, result, answer
FURTHER_ROUNDS = (0, 0, 1, 1, 2, 3)
IN_SESSION = 6  # requests to the same tools, at most


def single(scene: Scene) -> Turns:
    """One or more requests of one call each. A schema costs many tokens, so it mostly serves several requests."""
    rng = scene.rng
    first = scene.take()
    turns = _asked_and_done(scene, first)
    for _ in range(rng.choice(FURTHER_ROUNDS)):
        if rng.random() < 0.4 and len(scene.tools) < 2 and scene.has(_about(first.thing)):
            tool = scene.take(_about(first.thing))
        else:
            tool = rng.choice(scene.tools)
        turns += _asked_and_done(scene, tool)
    return turns


def session(scene: Scene) -> Turns:
    """Request after request to the same two to four tools."""
    for _ in range(scene.rng.randint(2, 4)):
        _take_one_more(scene)
    return [turn for _ in range(IN_SESSION) for turn in _asked_and_done(scene, scene.rng.choice(scene.tools))]


def parallel(scene: Scene) -> Turns:
    """One request, and two or three calls that are independent of each other."""
    rng = scene.rng
    first = scene.take()
    same = rng.random() < 0.6
    tools = [first] * rng.choice([2, 2, 3]) if same else [first, scene.take()]
    given = [scene.arguments(tool) for tool in tools]
    parts = [instruction(tool, values, rng) for tool, values in zip(tools, given, strict=True)]
    between = rng.choice([", and ", "; ", ", also ", " and ", ". "])
    text = between.join(part if between != ". " else upper_first(part) for part in parts)
    calls = tuple(call_of(tool, values) for tool, values in zip(tools, given, strict=True))
    results = tuple(scene.world.execute(tool, call) for tool, call in zip(tools, calls, strict=True))
    answers = [
        answer(tool, record_of(tool, values), result, rng)
        for tool, values, result in zip(tools, given, results, strict=True)
    ]
    return [
        Message("user", upper_first(f"{rng.choice(['', '', 'please '])}{text}{rng.choice(['.', '.', ''])}")),
        Message("assistant", calls=calls),
        Message("tool", results=results),
        Message("assistant", " ".join(answers)),
    ]


def sequential(scene: Scene) -> Turns:
    """A call that finds or makes a record, then a call on that record."""
    rng = scene.rng
    first = scene.take(lambda topic: topic.action in ("create", "search", "newest"))
    circle = BY_KEY[first.action].circle
    second = scene.take(
        lambda topic: topic.thing == first.thing and _takes_id(topic) and BY_KEY[topic.action].circle == circle
    )
    given = scene.arguments(first)
    shelf = scene.world.records.get(first.thing, {})
    for key in list(shelf)[:-1]:  # one record only fits
        del shelf[key]
    scene.world.busy.clear()
    later = scene.arguments(second, without=[parameter.name for parameter in second.parameters if _is_id(parameter)])
    then = rng.choice([" and ", ", then ", " and then ", ". Then "])
    text = instruction(first, given, rng) + then + instruction(second, later, rng, it=rng.choice(["it", "it", "that"]))
    result = scene.world.execute(first, call_of(first, given))
    record_id = result["ids"][0] if first.action == "search" else result["id"]
    later = with_record(second, later, record_id)
    return [
        Message("user", upper_first(f"{text}{rng.choice(['.', '.', ''])}")),
        Message("assistant", calls=(call_of(first, given),)),
        Message("tool", results=(result,)),
        *_done(scene, second, later),
    ]


def irrelevant(scene: Scene) -> Turns:
    """A request that none of the tools serves."""
    rng = scene.rng
    wanted = scene.take()
    text = request(wanted, scene.arguments(wanted), rng)
    scene.tools.remove(wanted)
    scene.hidden.add((wanted.thing, wanted.action))
    if rng.random() < 0.5 and scene.has(_about(wanted.thing)):
        scene.take(_about(wanted.thing))
    else:
        scene.take()
    return [Message("user", text), Message("assistant", nothing_fits(rng))]


def missing(scene: Scene) -> Turns:
    """A request without a required argument: the assistant asks, the user answers, the call follows."""
    rng = scene.rng
    tool = scene.take()
    left_out = rng.choice([parameter for parameter in tool.parameters if parameter.required])
    given = scene.arguments(tool)
    value = given[left_out]
    short = {parameter: other for parameter, other in given.items() if parameter != left_out}
    reply = rng.choice(
        [value.said, f"The {left_out.name} is {value.said}.", piece(left_out, value, True, rng), value.said]
    )
    if left_out.kind == "flag":
        reply = f"{left_out.name}: {value.said}"
    return [
        Message("user", request(tool, short, rng)),
        Message("assistant", question_back([left_out], tool, rng)),
        Message("user", upper_first(reply.removeprefix(": ")) if rng.random() < 0.5 and reply != value.said else reply),
        *_done(scene, tool, given),
    ]


def recovery(scene: Scene) -> Turns:
    """A call that fails, and the call that mends it."""
    rng = scene.rng
    if rng.random() < 0.35:
        tool = scene.take()
        given = scene.arguments(tool)
        scene.world.busy.add(tool.tool.name)
        return [Message("user", request(tool, given, rng)), *_failed(scene, tool, given), *_done(scene, tool, given)]
    tool = scene.take(_takes_id)
    given = scene.arguments(tool)
    right = record_of(tool, given)
    assert right is not None
    wrong = _slip(right, scene.world.records[tool.thing], rng)
    mistaken = with_record(tool, given, wrong)
    return [
        Message("user", request(tool, mistaken, rng)),
        *_failed(scene, tool, mistaken),
        *_done(scene, tool, given),
    ]


def plain_answer(scene: Scene) -> Turns:
    """A turn without a call: a question that an earlier result answers, a question about the tools, or thanks."""
    rng = scene.rng
    if rng.random() < 0.25:
        turns = _asked_and_done(scene, scene.take())
        thanks = rng.choice(["Thanks!", "Thank you.", "Great, thanks.", "Perfect."])
        return [*turns, Message("user", thanks), Message("assistant", rng.choice(["You are welcome.", "Gladly."]))]
    if rng.random() < 0.2:
        tool = scene.take()
        text = rng.choice(["What can you do?", "How can you help me?", "What are your tools for?"])
        return [Message("user", text), Message("assistant", f"I can {describe(tool, rng)}.")]
    tool = scene.take(lambda topic: topic.action == "lookup")
    turns = _asked_and_done(scene, tool)
    result: dict[str, Json] = turns[2].results[0]
    name = rng.choice(list(result))
    words = name.replace("_", " ")
    text = rng.choice(["What is its {}?", "And the {}?", "What was the {} again?", "Tell me the {} once more."])
    return [*turns, Message("user", text.format(words)), Message("assistant", f"The {words} is {shown(result[name])}.")]


def invented(scene: Scene) -> Turns:
    """Requests for tools of an invented domain."""
    return scene.rng.choice((single, single, parallel))(scene)


KINDS: dict[str, tuple[float, Callable[[Scene], Turns]]] = {  # share of conversations, episode
    "single": (0.30, single),
    "session": (0.18, session),
    "parallel": (0.09, parallel),
    "sequential": (0.07, sequential),
    "irrelevant": (0.07, irrelevant),
    "missing": (0.06, missing),
    "recovery": (0.04, recovery),
    "answer": (0.04, plain_answer),
    "invented": (0.15, invented),
}


def _asked_and_done(scene: Scene, tool: Specification) -> Turns:
    given = scene.arguments(tool)
    return [Message("user", request(tool, given, scene.rng)), *_done(scene, tool, given)]


def _done(scene: Scene, tool: Specification, given: Given) -> Turns:
    """The call, its result, and the answer."""
    call = call_of(tool, given)
    result = scene.world.execute(tool, call)
    return [*_called(call, result), Message("assistant", answer(tool, record_of(tool, given), result, scene.rng))]


def _failed(scene: Scene, tool: Specification, given: Given) -> Turns:
    """The call and its error."""
    call = call_of(tool, given)
    try:
        scene.world.execute(tool, call)
    except ToolFailure as failure:
        return _called(call, {"error": str(failure)})
    raise AssertionError(f"{call} was to fail")


def _called(call: Call, result: Json) -> Turns:
    return [Message("assistant", calls=(call,)), Message("tool", results=(result,))]


def _slip(right: str, known: dict[str, dict[str, Json]], rng: random.Random) -> str:
    """`right` with two neighbouring characters exchanged: a typing error."""
    places = [place for place in range(len(right) - 1) if right[place] != right[place + 1]]
    place = rng.choice([place for place in places if right[place : place + 2].isalnum()] or places)
    wrong = right[:place] + right[place + 1] + right[place] + right[place + 2 :]
    return wrong if wrong not in known else f"{right}0"


def _take_one_more(scene: Scene) -> None:
    """Take one more tool, often for the same thing as the first, so that only the action tells them apart."""
    if scene.tools and scene.rng.random() < 0.4 and scene.has(_about(scene.tools[0].thing)):
        scene.take(_about(scene.tools[0].thing))
    else:
        scene.take()


def _about(thing: str) -> Callable[[Topic], bool]:
    return lambda topic: topic.thing == thing


def _takes_id(topic: Topic) -> bool:
    return topic.family == "record" and BY_KEY[topic.action].takes_id


def _is_id(parameter: object) -> bool:
    return getattr(parameter, "kind", "") == "record"
