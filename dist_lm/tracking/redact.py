"""Secrets: they are removed from recorded command lines, environments and texts, and refused in a configuration."""

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
    "dsn",
    "webhook",
}
_SECRET_PAIRS = [["key", "id"], ["webhook", "url"], ["connection", "string"]]  # last two words: AWS_ACCESS_KEY_ID

# Words written together: HFTOKEN, GITHUBTOKEN, DBPASS. The short endings also end words of English, so they count only
# in capitals, as in names of variables, and not behind the beginning of such a word. What precedes them is looked at
# backwards, so that a name takes time that grows with its length alone.
_JOINED = re.compile(r"(?i)(?:token|secret|password|passwd|passphrase|credentials?|api_?key)$")
_JOINED_CAPITALS = re.compile(
    r"(?<=[A-Z0-9]{2})(?<!BY)(?<!COM)(?<!TRES)(?<!SUR)(?<!OVER)(?<!UNDER)(?<!LOW)(?<!HIGH)(?<!BAND)(?<!DOWN)PASS$"
    r"|(?<=[A-Z0-9]{2})(?<!OLD)PWD$"
    r"|(?<=[A-Z0-9]{2})(?<!MON)(?<!DON)(?<!TUR)(?<!HOT)(?<!WHIS)(?<!TURN)KEY(?:ID)?$"
)

# Words with other meanings (pass@1, the folder PWD), so they count only as the end of an option or a variable.
_SECRET_ENDINGS = re.compile(r"(?i)(?:^|[_-])(?:auth|bearer)$|[a-z0-9][_-](?:pass|pwd)$")
_SECRET_PREFIXES = ("RAY_AUTH_", "MYSQL_PWD")
_SHORTEST = 8  # characters; shorter values of secret variables also occur inside harmless words
_PLACES = ("_PATH", "_FILE", "_DIR")  # endings of variables that hold the path of a secret: RAY_AUTH_TOKEN_PATH

_WAY_OUT = "a value without it; the configuration is written to disk (give secrets in the environment)"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_URL_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^/\s]+@")  # a password may hold an @


def is_secret_name(name: str) -> bool:
    """Returns whether a name ends with `token`, `key`, `password` or another word for a secret. Of a dotted name the
    last part counts.

    `hf_token`, `HFTOKEN`, `DBPASS` and `SLACK_WEBHOOK_URL` are secret names; `max_new_tokens`, `key_size`, `token_path`
    and `bytes_per_token` are not. Words are separated by punctuation, by capitals, or not at all.
    """
    last_part = name.rpartition(".")[2]
    words = [word for word in _WORD.findall(last_part) if not word.isdigit()]
    last_words = [word.lower() for word in words[-2:]]

    if last_words in _SECRET_PAIRS or _SECRET_ENDINGS.search(last_part):
        return True
    if words and (_JOINED.search(words[-1]) or _JOINED_CAPITALS.search(words[-1])) and last_words[:-1] != ["per"]:
        return True

    # A rate such as bytes_per_token is not a secret.
    measured = last_words[:1] == ["per"] and len(last_words) == 2
    return name.startswith(_SECRET_PREFIXES) or (bool(words) and words[-1].lower() in _SECRET_WORDS and not measured)


def redact_text(text: str) -> str:
    """Returns `text` with user and password removed from every URL."""
    if "://" in text:
        return _URL_CREDENTIALS.sub(rf"\g<scheme>{REDACTED}@", text)
    return text


def redact(tree: Any) -> Any:
    """Returns a copy of a tree of mappings and sequences in which secrets, found by key or in URLs, are `***`."""
    if isinstance(tree, Mapping):
        return {key: _redact_named(str(key), child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(child) for child in tree]
    if isinstance(tree, str):
        return redact_text(tree)
    return tree


def redact_command(arguments: Sequence[str]) -> list[str]:
    """Returns a command line in which VALUE of `secret=VALUE`, `--secret=VALUE` and `--secret VALUE` is `***`, as are
    user and password of URLs. What a secret name is, `is_secret_name` says."""
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

        # The value of `--secret VALUE` is the next argument.
        hide_next = not equals and argument.startswith("--") and is_secret_name(argument)

    return safe


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without variables of secret names, for processes that need none.

    URLs with a password are removed as well, except those of proxies, which may be required for network access.
    """
    return {
        name: value
        for name, value in environment.items()
        if not is_secret_name(name) and (redact_text(value) == value or name.lower().endswith("_proxy"))
    }


def check_no_secrets(config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Refuses addresses with a password, values of keys named like secrets, and texts that contain the value of a
    secret variable of at least 8 characters.

    Args:
        config: the composed configuration with resolved interpolations.
        environ: environment whose variables `${oc.env:NAME}` may have inserted into the configuration.

    Raises:
        ConfigError: names the key, never the secret.
    """
    # A short value also occurs inside harmless words, and a path is no secret.
    secrets = {
        value: name
        for name, value in environ.items()
        # Every text is compared with every secret, since an interpolation may stand inside a longer value.
        if is_secret_name(name) and not _is_place(name.upper(), value) and len(value) >= _SHORTEST
    }

    for key, value in _texts(config, ""):
        if redact_text(value) != value:
            raise ConfigError(f"{key}=(an address with a password): expected {_WAY_OUT}")
        if value and is_secret_name(key):
            raise ConfigError(f"{key}=(a secret): expected {_WAY_OUT}")
        for secret, name in secrets.items():
            if secret in value:
                raise ConfigError(f"{key}=(what the variable {name} holds): expected {_WAY_OUT}")


def _is_place(name: str, value: str) -> bool:
    """Returns whether a variable holds the path of a secret, or a working directory as APPTAINER_PWD does."""
    return name.endswith(_PLACES) or (name.endswith("_PWD") and value.startswith("/"))


def _redact_named(name: str, value: Any) -> Any:
    if is_secret_name(name) and value not in (None, "") and not isinstance(value, Mapping | list | tuple | bool):
        return REDACTED
    return redact(value)


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, text) for every text in a tree of mappings and sequences, and for keys that hold secrets."""
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            if isinstance(name, str) and redact_text(name) != name:
                yield key, name
            yield from _texts(child, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for child in tree:
            yield from _texts(child, key)
    elif isinstance(tree, str):
        yield key, tree
