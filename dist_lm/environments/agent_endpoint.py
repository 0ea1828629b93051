"""The endpoint that programs of a user speak to over HTTP: chats in OpenAI's form, and the reward of a conversation.

    POST /v1/chat/completions   the key of the conversation    waits for the model's turn
    POST /v1/reward             the key of the reward          ends the conversation

A reward may also be that of the last turn alone: the conversation goes on after it.

It listens on 127.0.0.1 alone. Each conversation has two keys of its own. A request that is refused has an answer with
its reason, and changes nothing.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from aiohttp import web

from dist_lm.chat import json_text
from dist_lm.chat.messages import ChatError, Json
from dist_lm.chat.openai_errors import ProtocolError, error_value
from dist_lm.environments.agent_chat import NO_ROOM, ChatAnswer, ChatRequest, chat_request, opening_of
from dist_lm.environments.protocol import (
    FAILURES,
    Action,
    BadRewardError,
    EnvironmentFailedError,
    Observation,
    Verdict,
    finite,
)
from dist_lm.errors import shown_value

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
CHAT, REWARD, MODELS = "/v1/chat/completions", "/v1/reward", "/v1/models"
ENDED = "conversation_ended"  # code of what comes behind the verdict
_REWARDS = '{"reward": NUMBER}, {"turn_reward": NUMBER} or {"valid": false, "reason": REASON}'


class _Asked:
    """A request for a turn, until its answer has been taken."""

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.answer: asyncio.Future[ChatAnswer] = asyncio.get_running_loop().create_future()
        self.is_abandoned = False  # whether the client has gone, and may ask again


class Exchange:
    """What one conversation's program asks for and posts, in their order. For the event loop of the endpoint.

    Args:
        note_rewriting: is told how a request has changed earlier turns.
    """

    def __init__(self, note_rewriting: Callable[[str], None] = lambda change: None) -> None:
        self._note_rewriting = note_rewriting
        self.key, self.reward_key = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self._asked: _Asked | None = None
        self._answer: ChatAnswer | None = None  # the last one
        self._number = 0  # of turns of the model
        self._turn_reward = 0.0  # of the last turn
        self._no_turn = ""  # why no turn follows
        self._end: Verdict | EnvironmentFailedError | None = None
        self._arrivals: asyncio.Queue[Observation | Verdict | EnvironmentFailedError] = asyncio.Queue()

    async def next(self) -> Observation | Verdict:
        """Returns what the program does next: an observation to which it expects an answer, or the verdict.

        Raises:
            EnvironmentFailedError: it has ended the conversation without a reward, or broken it.
        """
        arrival = await self._arrivals.get()
        if isinstance(arrival, EnvironmentFailedError):
            raise arrival
        return arrival

    @property
    def has_arrival(self) -> bool:
        """Whether `next` returns at once."""
        return not self._arrivals.empty()

    @property
    def is_over(self) -> bool:
        """Whether the program has given its verdict."""
        return self._end is not None

    @property
    def turn_reward(self) -> float:
        """The reward of the last turn alone, once what follows that turn has arrived."""
        return self._turn_reward

    def answer(self, action: Action) -> None:
        """Answers the request that waits with a turn of the model; after one that is cut, no other is answered."""
        assert self._asked is not None, "an observation comes first"
        self._turn_reward = 0.0
        if action.cut:
            self._no_turn = action.cut

        # No token was left for this turn: clients know that by this code.
        if action.cut in NO_ROOM and not action.text and not action.calls:
            self._asked.answer.set_exception(self._no_turn_error())
            self._asked.answer.exception()  # the client may have gone, and nobody asks for it
            return
        self._answer = ChatAnswer(self._asked.request, action, self._number)
        self._number += 1
        self._asked.answer.set_result(self._answer)

    def close(self) -> None:
        """Refuses the request that waits, which nobody will answer."""
        if self._asked and not self._asked.answer.done():
            self._asked.answer.set_exception(ProtocolError("the conversation has ended", code=ENDED))
            self._asked.answer.exception()  # as above

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """Returns the model's turn that answers a request.

        Raises:
            ProtocolError: it is refused.
        """
        asked = self._asked
        # A client whose connection broke sends its request again.
        if asked is None or not asked.is_abandoned or asked.request.turns != request.turns:
            self._add(request)
        asked = self._asked
        assert asked is not None
        asked.is_abandoned = False
        try:
            return await asyncio.shield(asked.answer)
        except asyncio.CancelledError:
            asked.is_abandoned = True
            raise

    def _add(self, request: ChatRequest) -> None:
        """Makes a request the one that the model answers next.

        Raises:
            ProtocolError: it cannot be.
        """
        if self._end is not None:
            raise ProtocolError("the conversation has ended", code=ENDED)
        if self._asked and not self._asked.answer.done():
            message = "another request of this conversation waits for its answer: send one after another"
            raise ProtocolError(message, status=409, code="parallel_requests")
        if self._no_turn:
            raise self._no_turn_error()

        observation = self._observation(request)
        self._asked = _Asked(request)
        self._arrivals.put_nowait(observation)

    def _observation(self, request: ChatRequest) -> Observation:
        """Returns what a request adds to the conversation, or with what it begins anew.

        Raises:
            ProtocolError: it is no conversation; where what it adds has another form, that ends the conversation.
        """
        if self._answer is None:
            return opening_of(request)

        if change := self._answer.rewritten(request):
            opening = replace(opening_of(request), begins_anew=True)
            self._note_rewriting(change)
            return opening

        try:
            return self._answer.continuation(request)
        except EnvironmentFailedError as failure:
            self._finish(failure)
            raise ProtocolError(str(failure), param="messages", code=failure.reason) from None

    def _no_turn_error(self) -> ProtocolError:
        code = "context_length_exceeded" if self._no_turn in NO_ROOM else "turn_limit"
        message = f"no turn of the model follows ({self._no_turn}): post the reward to {REWARD}"
        return ProtocolError(message, param="messages", code=code)

    def judge(self, body: Mapping[str, Json]) -> bool:
        """Takes the reward in a body, and returns whether it ended the conversation: as its verdict, of which the first
        one counts. The reward of a turn takes the place of an earlier one, so that it may be sent again.

        Raises:
            ProtocolError: the body has another form, a turn is under way, or the conversation has ended.
        """
        if self._end is not None:
            raise ProtocolError("the conversation has ended, and its first verdict counts", code=ENDED)
        if self._asked and not self._asked.answer.done():
            raise ProtocolError("a request waits for its answer", status=409, code="parallel_requests")

        if body.get("valid") is False:
            self._finish(_failure(body))
            return True
        if self._answer is None:
            raise ProtocolError("the model has said nothing yet: chat first", status=409, code="no_turn")
        kind = "turn_reward" if "turn_reward" in body else "reward"
        if {*body} - {"valid"} != {kind} or body.get("valid", True) is not True:
            raise ProtocolError(f"expected {_REWARDS}", param=kind)
        try:
            reward = finite(body[kind])
        except BadRewardError as error:
            # A later number would hide that the first one was none.
            self._finish(EnvironmentFailedError("bad_reward", str(error)))
            raise ProtocolError(str(error), param=kind, code="bad_reward") from None

        if kind == "turn_reward":
            self._turn_reward = reward
            return False
        self._finish(Verdict.of(reward))
        return True

    def _finish(self, end: Verdict | EnvironmentFailedError) -> None:
        self._end = end
        self._arrivals.put_nowait(end)


def _failure(body: Mapping[str, Json]) -> EnvironmentFailedError:
    reason = body.get("reason")
    if {*body} - {"valid", "reason", "detail"} or reason not in FAILURES:
        accepted = f"reason of {', '.join(FAILURES)}, and no reward"
        raise ProtocolError(f"reason={shown_value(reason)}: expected a {accepted}", param="reason")
    return EnvironmentFailedError(reason, str(body.get("detail", "")))


class Endpoint:
    """The server. One for all conversations of a host.

    Args:
        most_bytes: of a body.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._by_key: dict[str, Exchange] = {}
        self._by_reward_key: dict[str, Exchange] = {}
        self._runner: web.AppRunner | None = None
        self._has_noted = False
        self.url = ""  # of the API, once it is open

    async def open(self) -> None:
        """Begins to listen, on a free port.

        Raises:
            OSError: it cannot.
        """
        app = web.Application(client_max_size=self._most_bytes, middlewares=[_refusals])
        app.router.add_post(CHAT, self._chat)
        app.router.add_post(REWARD, self._reward)
        app.router.add_get(MODELS, self._models)

        # Handlers are cancelled when their client goes, so that it may ask again.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, ADDRESS, 0).start()
        self.url = f"http://{ADDRESS}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Ends all connections; may be called twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def note_rewriting(self, change: str) -> None:
        """Logs how a program has changed earlier turns: the first time alone, since most of its conversations will."""
        if self._has_noted:
            return
        self._has_noted = True
        log.warning("a program rewrites its history, so its conversations begin anew as further samples: %s", change)

    def add(self, exchange: Exchange) -> None:
        """Lets the program of a conversation in."""
        self._by_key[exchange.key] = exchange
        self._by_reward_key[exchange.reward_key] = exchange

    def remove(self, exchange: Exchange) -> None:
        """Refuses all later requests of a conversation."""
        self._by_key.pop(exchange.key, None)
        self._by_reward_key.pop(exchange.reward_key, None)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        """Answers a chat request by the model's next turn: as one JSON object, or with `stream` as server-sent events.

        A stream begins only when the turn is complete, and ends with `data: [DONE]`.

        Raises:
            ProtocolError: the key is of no exchange, or the request is refused.
        """
        exchange = _with_key(http, self._by_key)
        request = chat_request(await _body(http))
        answer = await exchange.ask(request)
        if not request.stream:
            return web.json_response(answer.response)

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(http)
        lines = [*(json.dumps(chunk) for chunk in answer.chunks()), "[DONE]"]
        await response.write("".join(f"data: {line}\n\n" for line in lines).encode())
        await response.write_eof()
        return response

    async def _reward(self, http: web.Request) -> web.Response:
        exchange = _with_key(http, self._by_reward_key)
        is_over = exchange.judge(await _body(http, is_reward=True))
        return web.json_response({"done": is_over})

    async def _models(self, http: web.Request) -> web.Response:
        _with_key(http, self._by_key)
        model = {"id": "policy", "object": "model", "created": 0, "owned_by": "dist_lm"}
        return web.json_response({"object": "list", "data": [model]})


def _with_key(http: web.Request, exchanges: Mapping[str, Exchange]) -> Exchange:
    """Returns the conversation whose key a request has; before its body is read."""
    scheme, _, key = http.headers.get("Authorization", "").partition(" ")
    exchange = exchanges.get(key.strip()) if scheme.lower() == "bearer" else None
    if exchange is None:
        message = f"the key of {http.path} is missing or wrong, or its conversation has ended"
        raise ProtocolError(message, status=401, code="invalid_api_key")
    return exchange


async def _body(http: web.Request, is_reward: bool = False) -> Mapping[str, Json]:
    """Returns the object in a body.

    Args:
        is_reward: whether NaN and Infinity are read, so that they can be named.

    Raises:
        ProtocolError: the body is too long (status 413), no JSON in UTF-8, or no object (400).
    """
    try:
        text = (await http.read()).decode()
        body = json.loads(text) if is_reward else json_text.read(text, "body")
    except web.HTTPRequestEntityTooLarge as error:
        raise ProtocolError(f"the body is too long: {error.text}", status=413, code="body_too_large") from error
    except (ChatError, ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"a {type(body).__name__}; expected an object")
    return body


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answers what is refused in OpenAI's form."""
    try:
        return await handler(request)
    except ProtocolError as error:
        value = error_value(str(error), error.status, error.param, error.code)
        return web.json_response(value, status=error.status)
    except web.HTTPException as error:
        message = f"{request.method} {request.path}: {error.reason}; expected POST {CHAT} or POST {REWARD}"
        return web.json_response(error_value(message, error.status), status=error.status)
