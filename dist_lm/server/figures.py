"""The figures of the server as a text of Prometheus: counts, and times of the last requests as quantiles."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from dist_lm.server.backend import Backend

QUANTILES = (0.5, 0.99)
# Figures of each model: name, kind, meaning, and where the value comes from.
OF_MODELS: Sequence[tuple[str, str, str, Callable[[Backend], float]]] = (
    ("answers_total", "counter", "Complete answers.", lambda thread: thread.figures.answered),
    (
        "failed_total",
        "counter",
        "Requests that the engine refused or that waited too long.",
        lambda thread: thread.figures.failed,
    ),
    ("cancelled_total", "counter", "Requests whose client went away.", lambda thread: thread.figures.cancelled),
    ("prompt_tokens_total", "counter", "Tokens of prompts.", lambda thread: thread.figures.prompt_tokens),
    (
        "prefix_looked_up_tokens_total",
        "counter",
        "Prompt tokens looked up in the cache.",
        lambda thread: thread.prefix_counts.looked_up,
    ),
    (
        "prefix_reused_tokens_total",
        "counter",
        "Of these, the tokens that it held.",
        lambda thread: thread.prefix_counts.reused,
    ),
    ("new_tokens_total", "counter", "Tokens of answers.", lambda thread: thread.figures.new_tokens),
    ("answers_waiting", "gauge", "Answers that wait for the engine.", lambda thread: thread.figures.waiting),
    ("answers_running", "gauge", "Answers that the engine computes.", lambda thread: thread.figures.running),
    ("engines_up", "gauge", "Engines that compute.", lambda thread: thread.n_engines),
    ("cache_pages_free", "gauge", "Pages of the cache that no answer holds.", lambda thread: thread.free_pages),
    ("weights_version", "gauge", "Step of the checkpoint that new requests get.", lambda thread: thread.version),
)


def metrics_text(threads: Mapping[str, Backend], counts: Mapping[tuple[str, int], int], open_requests: int) -> str:
    """Returns the answer of /metrics, in the text format of Prometheus; names begin with `dist_lm_`.

    Args:
        threads: by the name of their model.
        counts: number of responses by path and status.
        open_requests: requests under way, with those whose body is still read.
    """
    lines = _heading("http_responses_total", "counter", "Responses by path and status.")
    for (path, status), count in sorted(counts.items()):
        lines.append(_sample("http_responses_total", {"path": path, "status": str(status)}, count))
    lines += _heading("requests_open", "gauge", "Requests under way.")
    lines.append(_sample("requests_open", {}, open_requests))

    for name, kind, meaning, value in OF_MODELS:
        lines += _heading(name, kind, meaning)
        lines += [_sample(name, {"model": model}, value(thread)) for model, thread in threads.items()]

    lines += _heading("queue_seconds", "summary", "Time from arrival to the first step.")
    for model, thread in threads.items():
        lines += _quantiles("queue_seconds", model, thread.figures.queue_s)
    lines += _heading("first_token_seconds", "summary", "Time from arrival to the first token.")
    for model, thread in threads.items():
        lines += _quantiles("first_token_seconds", model, thread.figures.first_token_s)
    return "\n".join(lines) + "\n"


def _heading(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP dist_lm_{name} {meaning}", f"# TYPE dist_lm_{name} {kind}"]


def _sample(name: str, labels: Mapping[str, str], value: float | str) -> str:
    """Returns one line; labels are escaped as Prometheus asks."""
    if not labels:
        return f"dist_lm_{name} {value}"
    pairs = []
    for key, text in labels.items():
        escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        pairs.append(f'{key}="{escaped}"')
    return f"dist_lm_{name}{{{','.join(pairs)}}} {value}"


def _quantiles(name: str, model: str, seconds: Iterable[float]) -> list[str]:
    ordered = sorted([*seconds])
    lines: list[str] = []
    for quantile in QUANTILES:
        # Prometheus writes a quantile of nothing as NaN.
        value = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else "NaN"
        lines.append(_sample(name, {"model": model, "quantile": str(quantile)}, value))
    return lines
