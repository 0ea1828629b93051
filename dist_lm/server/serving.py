"""What the routes share: the models by their names, and counts of requests."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dist_lm.errors import require, shown_value
from dist_lm.generation.grammar import Grammars
from dist_lm.server.engine_thread import EngineThread
from dist_lm.server.errors import ProtocolError
from dist_lm.server.fields import Json, typed
from dist_lm.server.served import Served, ServeLimits


@dataclass(frozen=True)
class ServedModel:
    """A model, and the engine that computes its answers."""

    served: Served
    thread: EngineThread
    grammars: Grammars


@dataclass
class Serving:
    """All models of the server, and what is under way."""

    models: Sequence[ServedModel]
    most_requests: int  # requests that may be under way at a time
    stop_s: float = 10.0  # seconds for the engines to end
    limits: ServeLimits = field(default_factory=ServeLimits)
    open_requests: int = 0
    counts: dict[tuple[str, int], int] = field(default_factory=dict)  # responses by path and status
    # Constraints that take long delay other new ones, and nothing else.
    compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "compiler"))

    def __post_init__(self) -> None:
        names = [name for model in self.models for name in model.served.names]
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, "--name", ", ".join(repeated), "another name for each model")

    @property
    def failure(self) -> str:
        """Why an engine computes no more; empty while all do."""
        return next((model.thread.failure for model in self.models if model.thread.failure), "")

    def model_of(self, body: Mapping[str, Json]) -> ServedModel:
        """Returns the model that a request names; one that names none gets the only one.

        Raises:
            ProtocolError: there is none of this name, or the request must choose.
        """
        name = typed(body, "model", str, None)
        if name is None:
            if len(self.models) > 1:
                raise ProtocolError(f"model: missing; expected one of {self._names}", param="model")
            return self.models[0]
        return self.model_named(name)

    def model_named(self, name: str) -> ServedModel:
        """Returns the model of a name.

        Raises:
            ProtocolError: there is none.
        """
        for model in self.models:
            if name in model.served.names:
                return model
        message = f"model={shown_value(name)}: expected {self._names}"
        raise ProtocolError(message, 404, "model", "model_not_found")

    @property
    def _names(self) -> str:
        return ", ".join(model.served.name for model in self.models)

    def count(self, path: str, status: int) -> None:
        """Counts a response."""
        self.counts[path, status] = self.counts.get((path, status), 0) + 1
