"""A configuration is written to disk, as it is, for every rank to read: one that holds a secret is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from dist_lm.errors import ConfigError
from dist_lm.tracking.redact import is_secret_name, redact_text

SHORTEST = 8  # characters of a variable's value that is looked for: a shorter one is found in innocent words
PLACES = ("_PATH", "_FILE", "_DIR")  # a variable that says where a secret is: RAY_AUTH_TOKEN_PATH
WAY_OUT = "a value without it; the configuration is written to disk (give secrets in the environment)"


def check_no_secrets(config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Refuse addresses with a password, texts under the name of a secret, and values of secret variables.

    Args:
        config: composed, interpolations resolved.
        environ: whose variables `${oc.env:NAME}` may have brought in.

    Raises:
        ConfigError: names the key, never the secret.
    """
    secret = {
        value: name
        for name, value in environ.items()
        if is_secret_name(name) and not name.upper().endswith(PLACES) and len(value) >= SHORTEST
    }
    for key, value in _texts(config, ""):
        if redact_text(value) != value:
            raise ConfigError(f"{key}=(an address with a password): expected {WAY_OUT}")
        if value and is_secret_name(key):
            raise ConfigError(f"{key}=(a secret): expected {WAY_OUT}")
        for held, name in secret.items():
            if held in value:
                raise ConfigError(f"{key}=(what the variable {name} holds): expected {WAY_OUT}")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in a tree of mappings and sequences, also those that are keys, with its dotted name."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from ((key, name),) if isinstance(name, str) and redact_text(name) != name else ()
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value
