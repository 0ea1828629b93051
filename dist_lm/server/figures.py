"""The figures of the server as a text of Prometheus: counts, and times of the last requests as quantiles."""

from collections.abc import Iterable, Mapping

from dist_lm.server.engine_thread import EngineThread

QUANTILES = (0.5, 0.99)


def metrics_text(thread: EngineThread, counts: Mapping[tuple[str, int], int], open_requests: int) -> str:
    """Returns the answer of /metrics.

    Args:
        counts: responses by path and status.
        open_requests: requests under way, with those whose body is still read.
    """
    figures, prefixes = thread.figures, thread.prefix_counts
    lines = [
        *_metric("http_responses_total", "counter", "Responses by path and status."),
        *(
            f'dist_lm_http_responses_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(counts.items())
        ),
    ]
    for name, kind, meaning, value in (
        ("answers_total", "counter", "Complete answers.", figures.answered),
        ("failed_total", "counter", "Requests that the engine refused or that waited too long.", figures.failed),
        ("cancelled_total", "counter", "Requests whose client went away.", figures.cancelled),
        ("prompt_tokens_total", "counter", "Tokens of prompts.", figures.prompt_tokens),
        ("prefix_looked_up_tokens_total", "counter", "Prompt tokens looked up in the cache.", prefixes.looked_up),
        ("prefix_reused_tokens_total", "counter", "Of these, the tokens that it held.", prefixes.reused),
        ("new_tokens_total", "counter", "Tokens of answers.", figures.new_tokens),
        ("requests_open", "gauge", "Requests under way.", open_requests),
        ("answers_waiting", "gauge", "Answers that wait for the engine.", figures.waiting),
        ("answers_running", "gauge", "Answers that the engine computes.", figures.running),
        ("cache_pages_free", "gauge", "Pages of the cache that no answer holds.", thread.free_pages),
    ):
        lines += [*_metric(name, kind, meaning), f"dist_lm_{name} {value}"]
    lines += _times("queue_seconds", "Time from arrival to the first step.", figures.queue_s)
    lines += _times("first_token_seconds", "Time from arrival to the first token.", figures.first_token_s)
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP dist_lm_{name} {meaning}", f"# TYPE dist_lm_{name} {kind}"]


def _times(name: str, meaning: str, seconds: Iterable[float]) -> list[str]:
    ordered = sorted([*seconds])
    lines = _metric(name, "summary", meaning)
    for quantile in QUANTILES:
        value = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else "NaN"
        lines.append(f'dist_lm_{name}{{quantile="{quantile}"}} {value}')
    return lines
