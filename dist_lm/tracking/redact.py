"""Secrets: removed from command lines, environments and what is recorded; refused in a configuration, which is written
to disk."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_lm.errors import ConfigError

REDACTED = "***"
_SECRET_WORDS = {
    "token",
    "key",
    "apikey",
    "secret",
    "password",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
    "pat",
    "jwt",
    "pgpassword",
}
# words that mean other things too (pass@1, the folder PWD), so only where the name is an option's or a variable's
_SECRET_ENDINGS = re.compile(r"(?i)(?:^|[_-])(?:auth|bearer)$|[a-z0-9][_-](?:pass|pwd)$")
_SECRET_PREFIXES = ("RAY_AUTH_", "MYSQL_PWD")
_SHORTEST = 8  # characters; shorter values of secret variables also occur inside harmless words
_PLACES = ("_PATH", "_FILE", "_DIR")  # variables that hold the path of a secret: RAY_AUTH_TOKEN_PATH
_WAY_OUT = "a value without it; the configuration is written to disk (give secrets in the environment)"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_URL_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^/\s]+@")  # a password may hold an @


def is_secret_name(name: str) -> bool:
    """Whether the last word of a name is `token`, `key`, `password` or another word for a secret.

    `hf_token` is a secret name; `max_new_tokens`, `key_size`, `token_path` and `bytes_per_token` are not. Words are
    separated by punctuation or by capitals.
    """
    own = name.rpartition(".")[2]
    words = [word for word in _WORD.findall(own) if not word.isdigit()]
    last = [word.lower() for word in words[-2:]]
    if last == ["key", "id"]:  # AWS_ACCESS_KEY_ID
        return True
    if _SECRET_ENDINGS.search(own):
        return True
    measured = last[:1] == ["per"] and len(last) == 2
    return name.startswith(_SECRET_PREFIXES) or (bool(words) and words[-1].lower() in _SECRET_WORDS and not measured)


def redact_text(text: str) -> str:
    """`text` with user and password removed from every URL."""
    return _URL_CREDENTIALS.sub(rf"\g<scheme>{REDACTED}@", text) if "://" in text else text


def redact(value: Any) -> Any:
    """A copy of a tree of mappings and sequences; secrets, recognised by key or in URLs, are replaced by `***`."""
    if isinstance(value, Mapping):
        return {key: _redact_named(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of `secret=VALUE`, `--secret=VALUE` and `--secret VALUE` replaced by `***`."""
    safe = []
    hide_next = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if hide_next:
            safe.append(REDACTED)
        elif equals and value and is_secret_name(name):
            safe.append(f"{name}={REDACTED}")
        else:
            safe.append(redact_text(argument))
        hide_next = not equals and argument.startswith("--") and is_secret_name(argument)
    return safe


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without secrets, for processes that need none.

    URLs with a password are removed as well, except those of proxies, which may be required for network access.
    """
    return {
        name: value
        for name, value in environment.items()
        if not is_secret_name(name) and (redact_text(value) == value or name.lower().endswith("_proxy"))
    }


def check_no_secrets(config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Refuse addresses with a password, values of keys named like secrets, and values of secret variables.

    Args:
        config: composed, interpolations resolved.
        environ: environment whose variables `${oc.env:NAME}` may have inserted.

    Raises:
        ConfigError: names the key, never the secret.
    """
    secret = {
        value: name
        for name, value in environ.items()
        if is_secret_name(name) and not _is_place(name.upper(), value) and len(value) >= _SHORTEST
    }
    for key, value in _texts(config, ""):
        if redact_text(value) != value:
            raise ConfigError(f"{key}=(an address with a password): expected {_WAY_OUT}")
        if value and is_secret_name(key):
            raise ConfigError(f"{key}=(a secret): expected {_WAY_OUT}")
        for held, name in secret.items():
            if held in value:
                raise ConfigError(f"{key}=(what the variable {name} holds): expected {_WAY_OUT}")


def _is_place(name: str, value: str) -> bool:
    """Whether a variable holds the path of a secret, or a working directory as APPTAINER_PWD does."""
    return name.endswith(_PLACES) or (name.endswith("_PWD") and value.startswith("/"))


def _redact_named(name: str, value: Any) -> Any:
    if is_secret_name(name) and value not in (None, "") and not isinstance(value, Mapping | list | tuple | bool):
        return REDACTED
    return redact(value)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every text in a tree of mappings and sequences; includes keys that hold secrets."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from ((key, name),) if isinstance(name, str) and redact_text(name) != name else ()
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value
