"""Keys, tokens and e-mail addresses in a text, replaced by placeholders: `<KEY>` and `<EMAIL>`, as StarCoder has them.

Keys are what the patterns of detect-secrets' plugins for tokens and keys match. Only the patterns are used: nothing is
verified, no settings are read, no process or thread is started. A text that lacks the words a pattern needs is not
searched. Private keys are replaced from BEGIN to END.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

KEY, EMAIL = "<KEY>", "<EMAIL>"

# module of detect_secrets.plugins -> words of which a text in lower case has one; none: the pattern is fast by itself.
# Not here: plugins that guess by entropy or by the name of a variable, and artifactory's, which takes words in capital
# letters for passwords
PLUGINS: dict[str, tuple[str, ...]] = {
    "aws": ("aws", "akia", "asia", "abia", "acca", "a3t"),
    "azure_storage_key": (),
    "basic_auth": (),
    "cloudant": ("cloudant",),
    "discord": (),
    "github_token": (),
    "gitlab_token": ("gl", "gr13"),
    "ibm_cloud_iam": ("ibm",),
    "ibm_cos_hmac": ("ibm",),
    "jwt": (),
    "mailchimp": ("-us",),
    "npm": (),
    "openai": (),
    "pypi_token": ("pypi-age",),
    "sendgrid": (),
    "slack": ("xox", "hooks.slack.com"),
    "softlayer": ("softlayer",),
    "square_oauth": (),
    "stripe": ("k_live_",),
    "telegram_token": (":aa",),
    "twilio": (),
}
SHORTEST = 12  # characters of a secret; a shorter group of a pattern is the prefix of a token
PASSWORD = re.compile(r"[^\s\"'/\\<>,(){}\[\]$%*]+")  # in an address; others are code around `://`
PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\S]{40,20000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|[A-Za-z0-9+/=\s\\]{64,})"
    r"|(?<=Private-Lines: )\d+\s+(?:[A-Za-z0-9+/=]{16,}\s+)+"  # PuTTY
)
REST = re.compile(r"[A-Za-z0-9_-]*")  # of a token of which a pattern matches the beginning
LOCAL = re.compile(r"[A-Za-z0-9](?:[\w.+-]{0,63})$", re.ASCII)
DOMAIN = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]{0,62})\.)+(?:com|org|net|edu|gov|mil|int|info|biz|name|dev|app|cloud|tech|[a-z]{2})"
    r"(?![\w(\[-]|\.\w)",
    re.IGNORECASE | re.ASCII,
)
LONGEST_LOCAL = 64  # characters before the @
NO_PERSON = ("git", "hg", "svn")  # users of addresses of repositories


class Redacted(NamedTuple):
    """A text with placeholders, and how many there are of each kind."""

    text: str
    secrets: int
    emails: int


def redacted(text: str, *, secrets: bool, emails: bool) -> Redacted:
    """The text with its secrets and e-mail addresses replaced."""
    n_secrets = n_emails = 0
    if secrets and (spans := merged([*secret_spans(text)])):
        text, n_secrets = _replaced(text, spans, KEY), len(spans)
    if emails and "@" in text and (spans := [*email_spans(text)]):
        text, n_emails = _replaced(text, spans, EMAIL), len(spans)
    return Redacted(text, n_secrets, n_emails)


def redacted_json(text: str, *, secrets: bool, emails: bool) -> Redacted:
    """A JSON text, as a corpus keeps a conversation, with the secrets and addresses of its strings replaced.

    The strings are searched one by one: an escape before an address would count as a part of it (`\\nann@x.org`).
    """
    n_secrets = n_emails = 0

    def changed(value: Any) -> Any:
        nonlocal n_secrets, n_emails
        if isinstance(value, dict):
            return {key: changed(one) for key, one in value.items()}
        if isinstance(value, list):
            return [changed(one) for one in value]
        if not isinstance(value, str) or (len(value) < SHORTEST and "@" not in value):
            return value
        found = redacted(value, secrets=secrets, emails=emails)
        n_secrets, n_emails = n_secrets + found.secrets, n_emails + found.emails
        return found.text

    try:
        value = changed(json.loads(text)) if secrets or emails else None
    except ValueError:  # the encoder refuses it by the name of its source
        return Redacted(text, 0, 0)
    return Redacted(json.dumps(value, ensure_ascii=False) if n_secrets or n_emails else text, n_secrets, n_emails)


def secret_spans(text: str) -> Iterator[tuple[int, int]]:
    """`(begin, end)` of keys and tokens, in no order; they may overlap."""
    folded = text.lower()
    for words, plugin in _plugins():
        if words and not any(word in folded for word in words):
            continue
        is_valid = getattr(plugin, "is_formally_valid", lambda token: True)  # of JSON web tokens
        is_password = type(plugin).__name__ == "BasicAuthDetector"
        for pattern in plugin.denylist:
            for match in pattern.finditer(text):
                group = max(range(1, pattern.groups + 1), key=lambda n: len(match.group(n) or ""), default=0)
                found = match.group(group)
                if is_password and not PASSWORD.fullmatch(found):
                    continue
                if len(found) < SHORTEST and not is_password:
                    group = 0
                if is_valid(match.group(group)):
                    begin, end = match.span(group)
                    yield begin, end if is_password else REST.match(text, end).end()  # type: ignore[union-attr]
    if "private" in folded:
        yield from (match.span() for match in PRIVATE_KEY.finditer(text))


def email_spans(text: str) -> Iterator[tuple[int, int]]:
    """`(begin, end)` of e-mail addresses, from first to last."""
    at = text.find("@")
    while at >= 0:
        domain = DOMAIN.match(text, at + 1)
        local = domain and LOCAL.search(text[max(0, at - LONGEST_LOCAL) : at])
        if domain and local and local.group() not in NO_PERSON:
            yield at - len(local.group()), domain.end()
        at = text.find("@", at + 1)


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans from first to last; those that overlap become one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _replaced(text: str, spans: list[tuple[int, int]], placeholder: str) -> str:
    parts, last = [], 0
    for begin, end in spans:
        parts += [text[last:begin], placeholder]
        last = end
    return "".join([*parts, text[last:]])


@cache
def _plugins() -> list[tuple[tuple[str, ...], Any]]:
    """(words, plugin) of every plugin. Their imports take half a second."""
    from detect_secrets.plugins.base import RegexBasedDetector

    found = []
    for name, words in PLUGINS.items():
        module = import_module(f"detect_secrets.plugins.{name}")
        kinds = [
            kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__
        ]
        found += [(words, kind()) for kind in kinds if issubclass(kind, RegexBasedDetector)]
    return found
