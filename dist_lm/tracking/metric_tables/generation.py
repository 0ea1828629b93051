"""Metrics of stage `generate`, whose steps are prompts."""

from dist_lm.tracking.metric import Better, Metric


def _metric(name: str, unit: str, meaning: str, better: Better, only: str = "") -> Metric:
    return Metric(f"generate/{name}", unit, meaning, better, ("generate",), "generate", only)


GENERATION = (
    _metric("prompts", "prompts", "Prompts that are answered or refused so far, by earlier commands too.", ""),
    _metric("answers", "answers", "Answers so far.", ""),
    _metric("refused", "prompts", "Prompts that were refused so far.", "lower"),
    _metric("tokens", "tokens", "Tokens of all answers so far.", ""),
    _metric("new_tokens_mean", "tokens", "Mean length of an answer.", "", "with an answer"),
    _metric("tokens_per_s", "tokens/s", "Tokens of answers that were finished a second since the last line.", "higher"),
    _metric("prompts_per_s", "prompts/s", "Prompts that were finished a second since the last line.", "higher"),
    _metric("engines", "engines", "Engines that are up.", "higher"),
    _metric("eta_s", "s", "Time left to the last prompt, at the pace of this command.", "lower", "behind a prompt"),
)
