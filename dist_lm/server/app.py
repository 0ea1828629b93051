"""The application: routes of OpenAI's API over the engines of `Serving`.

A request is read (`Api.read`), its constraint is compiled in a thread of its own, and the engine gets it. Events of the
engine come back through an `asyncio.Queue`. A client that goes away ends its request.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dist_lm.chat import json_text
from dist_lm.chat.openai_errors import ProtocolError, error_value
from dist_lm.chat.openai_fields import Json
from dist_lm.errors import UserError
from dist_lm.generation.request import Answer
from dist_lm.server.api import CHAT, COMPLETIONS, Api
from dist_lm.server.backend import Backend
from dist_lm.server.chat_page import add_chat_page
from dist_lm.server.door import App, Door, DoorRules, Receive, Scope, Send, bearer_token
from dist_lm.server.embedding_fields import embedding_job, embedding_response
from dist_lm.server.engine_thread import Done, Embedded, Event, Failed
from dist_lm.server.figures import metrics_text
from dist_lm.server.infill import INFILL
from dist_lm.server.job import Job
from dist_lm.server.response_answers import RESPONSES
from dist_lm.server.run import Run
from dist_lm.server.scoring import scored
from dist_lm.server.serving import ServedModel, Serving
from dist_lm.server.tokenizing import detokenized, tokenized
from dist_lm.server.turns import remember

RETRY_S = 1  # the value of `Retry-After`
GONE = 499  # status of a request whose client has gone, for the counts alone


def build_app(serving: Serving, rules: DoorRules) -> App:
    """Returns the application with its door, which checks every request by `rules`. The engines' threads run from its
    start to its end, and have `stop_s` seconds for answers under way.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for thread in serving.threads:
            thread.start()
        yield
        # All engines are told at once: the end takes `stop_s` seconds, however many models there are.
        stops = [run_in_threadpool(thread.stop, serving.stop_s) for thread in serving.threads]
        await asyncio.gather(*stops)
        serving.compiler.shutdown(wait=False, cancel_futures=True)

    # No pages of documentation: they would load scripts from another site.
    app = FastAPI(title="dist_lm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(app)
    _add_answers(app, serving)
    _add_models(app, serving)
    _add_state(app, serving)
    add_chat_page(app)
    return Door(app, rules, serving.limits.body_bytes, serving.count)


def _add_error_handlers(app: FastAPI) -> None:
    """Makes the application answer exceptions of its routes with OpenAI's error object, see `error_value`.

    A ProtocolError is answered with its own status (429 and 503 with `Retry-After`), and an HTTPException, such as an
    unknown path, with its status. Every other exception is answered with 500 and a text that tells no details.
    """

    @app.exception_handler(ProtocolError)
    async def refused(request: Request, error: ProtocolError) -> Response:
        # OpenAI's clients try again by themselves, after so many seconds.
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


def _add_answers(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(serving, CHAT, request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(serving, COMPLETIONS, request)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await _answer(serving, RESPONSES, request)

    @app.post("/infill")
    async def infill(request: Request) -> Response:
        return await _answer(serving, INFILL, request)


def _add_models(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models")
    async def models() -> Json:
        values = [served.value(name) for served in serving.all_served for name in served.names]
        return {"object": "list", "data": values}

    # Names of models hold slashes, such as sft/default/step_00000400.
    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        return serving.served_named(name).value(name)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await _embed(serving, request)

    @app.post("/score")
    async def score(request: Request) -> Json:
        body = await _json(request)
        return await run_in_threadpool(scored, body, serving.reward_of(body))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Json:
        body = await _json(request)
        served = serving.model_of(body).served
        return await run_in_threadpool(tokenized, body, served, _client(request))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Json:
        body = await _json(request)
        return await run_in_threadpool(detokenized, body, serving.model_of(body).served)


def _add_state(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    async def health() -> Json:
        if serving.failure:
            raise ProtocolError(serving.failure, status=503)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        # Models that share a base have one engine, whose figures are those of all.
        names: dict[Backend, list[str]] = {}
        for model in serving.models:
            names.setdefault(model.thread, []).append(model.served.name)
        threads = {",".join(of_thread): thread for thread, of_thread in names.items()}
        text = metrics_text(threads, serving.counts, serving.open_requests)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _json(request: Request) -> dict[str, Json]:
    """Returns the body of a request.

    Raises:
        ProtocolError: it is no JSON object, or nests too deep.
    """
    body = await request.body()
    try:
        # A body may have megabytes: to read it in this thread would stop the events of all other requests.
        value = await run_in_threadpool(lambda: json_text.read(body.decode(), "the body"))
    except UnicodeDecodeError as error:
        raise ProtocolError(f"the body is not UTF-8 at byte {error.start}") from error
    except UserError as error:
        raise ProtocolError(str(error)) from error
    if not isinstance(value, dict):
        raise ProtocolError("the body is no JSON object")
    return value


def _client(request: Request) -> str:
    """Returns the key that the client has sent, also where none is needed."""
    return bearer_token(request.headers.get("authorization", ""))


async def _answer(serving: Serving, api: Api, request: Request) -> Response:
    """Answers a request to an endpoint that answers with text.

    Raises:
        ProtocolError: it is refused.
    """
    # A request counts before it is parsed and its constraint is compiled, because both take time and memory.
    run: Run | None = _new_run(serving)
    try:
        body = await _json(request)
        model = _working_model(serving, body)
        job = await run_in_threadpool(api.read, body, model.served, _client(request))
        await _compile(serving, model, job)
        run.start(job, model.thread, request)
        if not job.stream:
            return await _complete(run, job, api)

        # An error before the first event still has a status of its own.
        event = await run.next_event()
        if event is None:
            return Response(status_code=GONE)
        if isinstance(event, Failed):
            raise ProtocolError(event.message, status=event.status)
        response = _Stream(_lines(run, job, api, event), run)
        run = None  # the response ends it
        return response
    finally:
        if run:
            run.end()


def _new_run(serving: Serving) -> Run:
    """Counts a request.

    Raises:
        ProtocolError: as many as may be are under way.
    """
    if serving.open_requests >= serving.most_requests:
        raise ProtocolError(f"{serving.most_requests} requests are under way: try again later", status=429)
    return Run(serving)


def _working_model(serving: Serving, body: dict[str, Json]) -> ServedModel:
    """Returns the model of a request.

    Raises:
        ProtocolError: there is none of this name, or its engine computes no more.
    """
    model = serving.model_of(body)
    if model.thread.failure:
        raise ProtocolError(model.thread.failure, status=503)
    return model


async def _embed(serving: Serving, request: Request) -> Response:
    """Answers a request for embeddings.

    Raises:
        ProtocolError: it is refused.
    """
    run = _new_run(serving)
    try:
        body = await _json(request)
        model = _working_model(serving, body)
        job = await run_in_threadpool(embedding_job, body, model.served)
        run.start_embedding(job, model.thread, request)

        event = await run.next_event()
        if event is None:
            return Response(status_code=GONE)
        if isinstance(event, Failed):
            raise ProtocolError(event.message, status=event.status)
        assert isinstance(event, Embedded), "an embedding has no other event"
        return JSONResponse(await run_in_threadpool(embedding_response, job, event))
    finally:
        run.end()


async def _compile(serving: Serving, model: ServedModel, job: Job) -> None:
    """Compiles the constraint of a job, if it is new.

    Raises:
        ProtocolError: it cannot be read, or no grammar holds to it.
    """
    constraint = job.requests[0].constraint
    if constraint is None or model.grammars.has(constraint):
        return
    loop = asyncio.get_running_loop()
    try:
        await loop.run_in_executor(serving.compiler, model.grammars.prepare, constraint)
    except UserError as error:
        raise ProtocolError(str(error), param="tools" if job.reads_calls else "response_format") from error


async def _complete(run: Run, job: Job, api: Api) -> Response:
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
            remember(event.answer, job)
            answers[event.answer.request, event.answer.index] = event.answer

    # Answers end in any order; the choices of a response are ordered by prompt and index.
    in_order = [[answers[request.id, index] for index in range(request.n)] for request in job.requests]
    value = await run_in_threadpool(api.response, job, in_order, int(time.time()))
    return JSONResponse(value)


async def _lines(run: Run, job: Job, api: Api, first: Event) -> AsyncIterator[str]:
    """Yields the server-sent events of a stream, which ends with its last answer or with an error; nothing is raised
    for an answer that has failed.

    Args:
        first: the event that has come already; the others are awaited from `run`.
    """
    stream = api.stream(job, int(time.time()))
    event: Event | None = first
    while event is not None:
        if isinstance(event, Failed):
            yield stream.error(event.message, event.status)
            return
        if isinstance(event, Done):
            remember(event.answer, job)
        for line in stream.of(event):
            yield line
        if not run.n_open:
            break
        event = await run.next_event()
    for line in stream.end():
        yield line


class _Stream(StreamingResponse):
    """A stream that ends its requests, however it ends: also if the client has gone before it began."""

    def __init__(self, content: AsyncIterator[str], run: Run) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            return
        finally:
            self._run.end()
