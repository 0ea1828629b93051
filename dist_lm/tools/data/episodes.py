"""The kinds of conversations: functions that write one, from the request to the answer.

Each function picks its tools from the scene and returns the turns, from the first request of the user to the last
answer. Results are the return values of the tools. A function changes the scene: it adds the tools that it picks, and
its world gets the records that the calls need, create or change. An IndexError of `Scene.pick` means that the shelf has
too few tools.
"""

import random
from collections.abc import Callable

from dist_lm.chat.messages import Call, Json, Message
from dist_lm.tools.data.actions import BY_KEY
from dist_lm.tools.data.catalogue import Specification, Topic
from dist_lm.tools.data.phrasing import (
    ArgumentValues,
    answer,
    argument_phrase,
    describe,
    in_words,
    instruction,
    nothing_fits,
    question_back,
    request,
)
from dist_lm.tools.data.scene import Scene, ToolError, call_of, record_of, with_record
from dist_lm.tools.data.words import upper_first

Turns = list[Message]
ROUND = 4  # messages of a request with one call: request, call, result, answer
FURTHER_ROUNDS = (0, 0, 1, 1, 2, 3)  # further requests of a conversation, one of these numbers
IN_SESSION = 6  # most requests of a session; a session that is too long loses its last ones


def single(scene: Scene) -> Turns:
    """Picks one or two tools and returns one or more requests of one call each, with results and answers.

    A schema costs many tokens, so it mostly serves several requests.
    """
    rng = scene.rng
    first = scene.take()

    # Further requests use the tool again, or a second tool for the same subject.
    turns = _round(scene, first)
    for _ in range(rng.choice(FURTHER_ROUNDS)):
        if rng.random() < 0.4 and len(scene.tools) < 2 and scene.has(_about(first.subject)):
            tool = scene.take(_about(first.subject))
        else:
            tool = rng.choice(scene.tools)
        turns += _round(scene, tool)

    return turns


def session(scene: Scene) -> Turns:
    """Writes request after request to the same two to four tools."""
    for _ in range(scene.rng.randint(2, 4)):
        _add_tool(scene)

    return [turn for _ in range(IN_SESSION) for turn in _round(scene, scene.rng.choice(scene.tools))]


def parallel(scene: Scene) -> Turns:
    """Picks tools and returns one request, two or three calls in one turn that are independent of each other, their
    results and one answer."""
    rng = scene.rng

    first = scene.take()
    same_tool = rng.random() < 0.6
    if same_tool:
        tools = [first] * rng.choice([2, 2, 3])
    else:
        tools = [first, scene.take()]

    # All values are drawn before the text, since the request names them.
    arguments_of_call = [scene.arguments(tool) for tool in tools]

    instructions = [instruction(tool, arguments, rng) for tool, arguments in zip(tools, arguments_of_call, strict=True)]
    separator = rng.choice([", and ", "; ", ", also ", " and ", ". "])
    # A new sentence begins with a capital.
    if separator == ". ":
        instructions = list(map(upper_first, instructions))
    text = separator.join(instructions)

    calls = tuple(call_of(tool, arguments) for tool, arguments in zip(tools, arguments_of_call, strict=True))
    results = tuple(scene.world.execute(tool, call) for tool, call in zip(tools, calls, strict=True))
    answers = [
        answer(tool, record_of(tool, arguments), result, rng)
        for tool, arguments, result in zip(tools, arguments_of_call, results, strict=True)
    ]

    return [
        Message("user", upper_first(f"{rng.choice(['', '', 'please '])}{text}{rng.choice(['.', '.', ''])}")),
        Message("assistant", calls=calls),
        Message("tool", results=results),
        Message("assistant", " ".join(answers)),
    ]


def sequential(scene: Scene) -> Turns:
    """Picks two tools and returns one request, a call that finds or creates a record, then a call on that record, each
    with its result, and the answer.

    Earlier records of the subject are deleted and no tool is busy any more, so that both calls succeed.

    Raises:
        ToolError: a tool refuses a call.
    """
    rng = scene.rng
    first = scene.take(lambda topic: topic.action in ("create", "search", "newest"))

    # The second tool works on the same subject and is in the same circle, so it is on the same shelf.
    circle = BY_KEY[first.action].circle
    second = scene.take(
        lambda topic: topic.subject == first.subject and _takes_id(topic) and BY_KEY[topic.action].circle == circle
    )

    # One record is left that fits, so the second call has one meaning.
    arguments = scene.arguments(first)
    records = scene.world.records.get(first.subject, {})
    for record_id in list(records)[:-1]:
        del records[record_id]
    scene.world.busy.clear()

    # The user cannot name the record, whose id only the result of the first call gives.
    ids = [parameter.name for parameter in second.parameters if parameter.kind == "record"]
    second_arguments = scene.arguments(second, without=ids)
    link = rng.choice([" and ", ", then ", " and then ", ". Then "])
    text = instruction(first, arguments, rng) + link
    text += instruction(second, second_arguments, rng, it=rng.choice(["it", "it", "that"]))

    result = scene.world.execute(first, call_of(first, arguments))
    record_id = result["ids"][0] if first.action == "search" else result["id"]
    second_arguments = with_record(second, second_arguments, record_id)

    return [
        Message("user", upper_first(f"{text}{rng.choice(['.', '.', ''])}")),
        Message("assistant", calls=(call_of(first, arguments),)),
        Message("tool", results=(result,)),
        *_call_and_answer(scene, second, second_arguments),
    ]


def irrelevant(scene: Scene) -> Turns:
    """Returns a request that none of the tools serves, and the answer that says so. One tool is offered; the one that
    would serve is hidden."""
    # The request is written for a tool that exists, so that it reads like any other.
    rng = scene.rng
    absent = scene.take()
    text = request(absent, scene.arguments(absent), rng)

    # The tool that would serve the request is not offered, nor is another variant of it.
    scene.tools.remove(absent)
    scene.hidden.add((absent.subject, absent.action))

    if rng.random() < 0.5 and scene.has(_about(absent.subject)):
        scene.take(_about(absent.subject))
    else:
        scene.take()

    return [Message("user", text), Message("assistant", nothing_fits(rng))]


def missing(scene: Scene) -> Turns:
    """Picks a tool and returns a request without a required argument: the assistant asks, the user answers, call,
    result and answer follow."""
    rng = scene.rng
    tool = scene.take()
    omitted = rng.choice([parameter for parameter in tool.parameters if parameter.required])
    arguments = scene.arguments(tool)

    incomplete = {parameter: value for parameter, value in arguments.items() if parameter != omitted}

    # The reply names the value alone, or together with its argument; a flag needs its name.
    wording = arguments[omitted].wording
    phrase = argument_phrase(omitted, arguments[omitted], True, rng)
    reply = rng.choice([wording, f"The {omitted.name} is {wording}.", phrase, wording])
    if omitted.kind == "flag":
        # `yes` alone would leave open what it answers.
        reply = f"{omitted.name}: {wording}"

    turns = [
        Message("user", request(tool, incomplete, rng)),
        Message("assistant", question_back(omitted, rng)),
    ]
    if rng.random() < 0.5 and reply != wording:
        reply = upper_first(reply.removeprefix(": "))
    return [*turns, Message("user", reply), *_call_and_answer(scene, tool, arguments)]


def recovery(scene: Scene) -> Turns:
    """Picks a tool and returns a request, a call that fails, and the call that corrects it: the same again if the
    server was busy, or with the right id if the user mistyped it."""
    rng = scene.rng

    # The server is busy: the same call succeeds the second time.
    if rng.random() < 0.35:
        tool = scene.take()
        arguments = scene.arguments(tool)
        scene.world.busy.add(tool.tool.name)
        return [
            Message("user", request(tool, arguments, rng)),
            *_failing_call(scene, tool, arguments),
            *_call_and_answer(scene, tool, arguments),
        ]

    # The user mistypes the id: the error names the one that is meant.
    tool = scene.take(_takes_id)
    arguments = scene.arguments(tool)

    record_id = record_of(tool, arguments)
    assert record_id is not None
    mistyped_id = _typing_error(record_id, scene.world.records[tool.subject], rng)
    mistyped = with_record(tool, arguments, mistyped_id)

    return [
        Message("user", request(tool, mistyped, rng)),
        *_failing_call(scene, tool, mistyped),
        *_call_and_answer(scene, tool, arguments),
    ]


def plain_answer(scene: Scene) -> Turns:
    """Picks a tool and returns turns whose last answer needs no call: to a question that an earlier result answers, to
    a question about the tools, or to thanks."""
    rng = scene.rng

    # A call, then thanks that need no call.
    if rng.random() < 0.25:
        turns = _round(scene, scene.take())
        thanks = rng.choice(["Thanks!", "Thank you.", "Great, thanks.", "Perfect."])
        return [*turns, Message("user", thanks), Message("assistant", rng.choice(["You are welcome.", "Gladly."]))]

    # A question about the offered tools.
    if rng.random() < 0.2:
        tool = scene.take()
        text = rng.choice(["What can you do?", "How can you help me?", "What are your tools for?"])
        return [Message("user", text), Message("assistant", f"I can {describe(tool, rng)}.")]

    # A question that the result of an earlier lookup answers.
    tool = scene.take(lambda topic: topic.action == "lookup")
    turns = _round(scene, tool)
    result: dict[str, Json] = turns[2].results[0]
    name = rng.choice(list(result))
    field = name.replace("_", " ")
    text = rng.choice(["What is its {}?", "And the {}?", "What was the {} again?", "Tell me the {} once more."])
    reply = f"The {field} is {in_words(result[name])}."
    return [*turns, Message("user", text.format(field)), Message("assistant", reply)]


def invented(scene: Scene) -> Turns:
    """Writes requests for tools of an invented domain."""
    return scene.rng.choice((single, single, parallel))(scene)


KINDS: dict[str, tuple[float, Callable[[Scene], Turns]]] = {  # kind -> (share of conversations, function)
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


def _round(scene: Scene, tool: Specification) -> Turns:
    arguments = scene.arguments(tool)
    return [Message("user", request(tool, arguments, scene.rng)), *_call_and_answer(scene, tool, arguments)]


def _call_and_answer(scene: Scene, tool: Specification, arguments: ArgumentValues) -> Turns:
    """Executes the call, which changes the records of the scene, and returns its turn, the result, and the answer.

    Raises:
        ToolError: the tool refuses the call.
    """
    call = call_of(tool, arguments)
    result = scene.world.execute(tool, call)
    return [
        *_call_and_result(call, result),
        Message("assistant", answer(tool, record_of(tool, arguments), result, scene.rng)),
    ]


def _failing_call(scene: Scene, tool: Specification, arguments: ArgumentValues) -> Turns:
    """Executes a call that the caller has made fail, and returns its turn and the error as its result, `{"error":
    why}`. A call that succeeds is a mistake of the generator (AssertionError).
    """
    call = call_of(tool, arguments)
    try:
        scene.world.execute(tool, call)
    except ToolError as error:
        return _call_and_result(call, {"error": str(error)})

    # The caller has arranged that the call fails, so this is a mistake of the generator.
    raise AssertionError(f"{call} was to fail")


def _call_and_result(call: Call, result: Json) -> Turns:
    return [Message("assistant", calls=(call,)), Message("tool", results=(result,))]


def _typing_error(record_id: str, records: dict[str, dict[str, Json]], rng: random.Random) -> str:
    """Returns `record_id` with two neighbouring characters exchanged; if a record has that id, `record_id` with a 0
    behind it."""
    # Exchanging equal characters would change nothing; letters and digits are preferred to separators.
    positions = [index for index in range(len(record_id) - 1) if record_id[index] != record_id[index + 1]]
    between_alike = [index for index in positions if record_id[index : index + 2].isalnum()]
    index = rng.choice(between_alike or positions)
    mistyped = record_id[:index] + record_id[index + 1] + record_id[index] + record_id[index + 2 :]
    # The mistyped id must be nobody's.
    if mistyped in records:
        return f"{record_id}0"
    return mistyped


def _add_tool(scene: Scene) -> None:
    """Adds a tool, often for the same subject as the first, so that only the action tells them apart."""
    if scene.tools and scene.rng.random() < 0.4 and scene.has(_about(scene.tools[0].subject)):
        scene.take(_about(scene.tools[0].subject))
    else:
        scene.take()


def _about(subject: str) -> Callable[[Topic], bool]:
    return lambda topic: topic.subject == subject


def _takes_id(topic: Topic) -> bool:
    return topic.family == "record" and BY_KEY[topic.action].takes_id
