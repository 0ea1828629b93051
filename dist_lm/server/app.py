"""The application: routes of OpenAI's API over one `EngineThread`.

A request is read (`protocol.job_of`), its constraint is compiled in a thread of its own, and the engine gets it. Events
of the engine come back through an `asyncio.Queue`. A client that goes away ends its request.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dist_lm.chat import json_text
from dist_lm.errors import UserError
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.request import Answer
from dist_lm.server.chat_page import add_chat_page
from dist_lm.server.door import App, Door, DoorRules, Message, Receive, Scope, Send
from dist_lm.server.engine_thread import Done, EngineThread, Event, Failed
from dist_lm.server.figures import metrics_text
from dist_lm.server.protocol import (
    Endpoint,
    Job,
    Json,
    ProtocolError,
    Served,
    detokenized,
    error_value,
    job_of,
    model_value,
    models_value,
    remember,
    response_of,
    tokenized,
)
from dist_lm.server.stream import Chunks

RETRY_S = 1  # what `Retry-After` says
SEND_S = 60.0  # seconds in which a client must take a piece of a stream
GONE = 499  # status of a request whose client has gone, for the counts alone


@dataclass
class Serving:
    """What the routes share."""

    served: Served
    thread: EngineThread
    grammars: Grammars
    most_requests: int  # requests that may be under way at a time
    stop_s: float = 10.0  # seconds for the engine to end
    open_requests: int = 0
    counts: dict[tuple[str, int], int] = field(default_factory=dict)  # responses by path and status
    # Constraints that take long delay other new ones, and nothing else.
    compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "compiler"))

    def count(self, path: str, status: int) -> None:
        """Counts a response."""
        self.counts[path, status] = self.counts.get((path, status), 0) + 1


def build_app(serving: Serving, rules: DoorRules) -> App:
    """Returns the application with its door. The engine's thread runs from its start to its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving.thread.start()
        yield
        await run_in_threadpool(serving.thread.stop, serving.stop_s)
        serving.compiler.shutdown(wait=False, cancel_futures=True)

    # No pages of documentation: they would load scripts from another site.
    app = FastAPI(title="dist_lm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ProtocolError)
    async def refused(request: Request, error: ProtocolError) -> Response:
        headers = {"Retry-After": str(RETRY_S)} if error.status in (429, 503) else None
        value = error_value(str(error), error.status, error.param, error.code)
        return JSONResponse(value, error.status, headers=headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:  # the traceback goes to the log
        return JSONResponse(error_value("the server has a defect: its log says more", 500), 500)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_value(message, error.status_code), error.status_code)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(serving, "chat", request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(serving, "completions", request)

    @app.get("/v1/models")
    async def models() -> Json:
        return models_value(serving.served)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        return model_value(name, serving.served)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Json:
        body = await _json(request)
        return await run_in_threadpool(tokenized, body, serving.served)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Json:
        body = await _json(request)
        return await run_in_threadpool(detokenized, body, serving.served)

    @app.get("/health")
    async def health() -> Json:
        if serving.thread.failure:
            raise ProtocolError(serving.thread.failure, status=503)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        text = metrics_text(serving.thread, serving.counts, serving.open_requests)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    add_chat_page(app)
    return Door(app, rules, serving.served.limits.body_bytes, serving.count)


async def _json(request: Request) -> dict[str, Json]:
    """Returns the body of a request.

    Raises:
        ProtocolError: it is no JSON object, or nests too deep.
    """
    body = await request.body()
    try:
        value = await run_in_threadpool(lambda: json_text.read(body.decode(), "the body"))
    except UnicodeDecodeError as error:
        raise ProtocolError(f"the body is not UTF-8 at byte {error.start}") from error
    except UserError as error:
        raise ProtocolError(str(error)) from error
    if not isinstance(value, dict):
        raise ProtocolError("the body is no JSON object")
    return value


async def _answer(serving: Serving, endpoint: Endpoint, request: Request) -> Response:
    """Answers a request to one of the two endpoints.

    Raises:
        ProtocolError: it is refused.
    """
    if serving.thread.failure:
        raise ProtocolError(serving.thread.failure, status=503)
    if serving.open_requests >= serving.most_requests:
        raise ProtocolError(f"{serving.most_requests} requests are under way: try again later", status=429)

    run: _Run | None = _Run(serving)
    try:
        body = await _json(request)
        job = await run_in_threadpool(job_of, endpoint, body, serving.served)
        await _compile(serving, job)
        run.start(job, request)
        if not job.stream:
            return await _complete(run, job, serving.served)

        # An error before the first event still has a status of its own.
        event = await run.next_event()
        if event is None:
            return Response(status_code=GONE)
        if isinstance(event, Failed):
            raise ProtocolError(event.message, status=event.status)
        response = _Stream(_lines(run, job, serving.served, event), run)
        run = None  # the response ends it
        return response
    finally:
        if run:
            run.end()


async def _compile(serving: Serving, job: Job) -> None:
    """Compiles the constraint of a job, if it is new.

    Raises:
        ProtocolError: it cannot be read, or no grammar holds to it.
    """
    constraint = job.requests[0].constraint
    if constraint is None or serving.grammars.has(constraint):
        return
    loop = asyncio.get_running_loop()
    try:
        await loop.run_in_executor(serving.compiler, serving.grammars.prepare, constraint)
    except UserError as error:
        raise ProtocolError(str(error), param="tools" if job.reads_calls else "response_format") from error


class _Run:
    """The requests of a job in the engine, and their events."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._gone: asyncio.Task[None] | None = None
        self._is_open = True
        self._under_way: set[str] = set()
        self.n_open = 0  # answers that are not complete
        serving.open_requests += 1

    def start(self, job: Job, request: Request) -> None:
        """Gives the requests of a job to the engine, and watches for the end of the client's connection, whose body
        has been read."""
        loop = asyncio.get_running_loop()
        self._gone = asyncio.create_task(_client_gone(request))

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        for engine_request in job.requests:
            self._under_way.add(engine_request.id)
            self.n_open += engine_request.n
            self._serving.thread.submit(engine_request, sink, streams=job.stream)

    async def next_event(self) -> Event | None:
        """Returns the next event; None: the client has gone."""
        assert self._gone, "the run has started"
        event = asyncio.create_task(self._events.get())
        try:
            await asyncio.wait({event, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not event.done():
                event.cancel()
        if event.cancelled() or not event.done():
            return None
        result = event.result()
        if isinstance(result, Done):
            self.n_open -= 1
        return result

    def end(self) -> None:
        """Cancels what is not complete; a second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        if self._gone:
            self._gone.cancel()
        self._serving.open_requests -= 1
        # The engine ignores requests that are complete.
        if self.n_open:
            for name in self._under_way:
                self._serving.thread.cancel(name)


async def _client_gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _complete(run: _Run, job: Job, served: Served) -> Response:
    """Returns the response with all answers.

    Raises:
        ProtocolError: the engine refused a request.
    """
    answers: dict[tuple[str, int], Answer] = {}
    while run.n_open:
        event = await run.next_event()
        if event is None:
            return Response(status_code=GONE)
        if isinstance(event, Failed):
            raise ProtocolError(event.message, status=event.status)
        if isinstance(event, Done):
            remember(event.answer, job, served)
            answers[event.answer.request, event.answer.index] = event.answer
    in_order = [[answers[request.id, index] for index in range(request.n)] for request in job.requests]
    value = await run_in_threadpool(response_of, job, in_order, served, int(time.time()))
    return JSONResponse(value)


async def _lines(run: _Run, job: Job, served: Served, first: Event) -> AsyncIterator[str]:
    """Yields the events of a stream as server-sent events; the last one is `[DONE]`, or an error."""
    chunks = Chunks(job, served, int(time.time()))
    event: Event | None = first
    while event is not None:
        if isinstance(event, Failed):
            yield _line(error_value(event.message, event.status))
            return
        if isinstance(event, Done):
            remember(event.answer, job, served)
        for chunk in chunks.of(event):
            yield _line(chunk)
        if not run.n_open:
            break
        event = await run.next_event()
    for chunk in chunks.end():
        yield _line(chunk)
    yield "data: [DONE]\n\n"


def _line(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """A stream that ends its requests, however it ends: also if the client has gone before it began."""

    def __init__(self, content: AsyncIterator[str], run: _Run) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_S):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except (TimeoutError, ClientDisconnect):
            return  # a client that takes nothing, or has gone
        finally:
            self._run.end()
