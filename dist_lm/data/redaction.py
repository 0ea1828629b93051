"""Replaces keys, tokens and e-mail addresses in a text by placeholders: `<KEY>` and `<EMAIL>`, as StarCoder has them.

Keys are found by the patterns of detect-secrets' plugins for tokens and keys. Only the patterns are used: nothing is
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

# Module of detect_secrets.plugins -> a text in lower case has one of these words; none: the pattern is fast by itself.
# Plugins that guess by entropy or by the name of a variable are left out, and so is artifactory's, which takes words in
# capital letters for passwords.
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
REST = re.compile(r"[A-Za-z0-9_-]*")  # rest of a token, because some patterns match only its beginning
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
    """Returns the text with `<KEY>` for each secret and `<EMAIL>` for each address, and their counts.

    `secrets` and `emails` choose what is replaced. The first search for secrets imports the patterns: half a second.
    """
    # Secrets first: a password in a URL ends at an @, and would look like the name in an address.
    n_secrets = n_emails = 0
    if secrets and (spans := merged([*secret_spans(text)])):
        text, n_secrets = _replaced(text, spans, KEY), len(spans)
    if emails and "@" in text and (spans := [*email_spans(text)]):
        text, n_emails = _replaced(text, spans, EMAIL), len(spans)
    return Redacted(text, n_secrets, n_emails)


def redacted_json(text: str, *, secrets: bool, emails: bool) -> Redacted:
    r"""Replaces the secrets and addresses in the strings of a JSON text, the form of conversations in a corpus.

    The strings are searched one by one: an escape before an address would count as a part of it (`\nann@x.org`).
    Keys of objects stay. A text without a find, or that is no JSON, is returned as it is, byte by byte, with counts of
    0; a text with a find is written again by `json.dumps`.
    """
    n_secrets = n_emails = 0

    def redact_strings(node: Any) -> Any:
        """Returns a copy of a JSON value with clean strings; adds what was replaced to both counts."""
        nonlocal n_secrets, n_emails
        if isinstance(node, dict):
            return {key: redact_strings(child) for key, child in node.items()}
        if isinstance(node, list):
            return [redact_strings(child) for child in node]
        if not isinstance(node, str) or (len(node) < SHORTEST and "@" not in node):
            return node
        clean = redacted(node, secrets=secrets, emails=emails)
        n_secrets += clean.secrets
        n_emails += clean.emails
        return clean.text

    if not secrets and not emails:
        return Redacted(text, 0, 0)
    try:
        clean_tree = redact_strings(json.loads(text))
    except ValueError:  # the encoder refuses it by the name of its source
        return Redacted(text, 0, 0)

    # A text without secrets stays as it is, byte by byte.
    if n_secrets or n_emails:
        text = json.dumps(clean_tree, ensure_ascii=False)
    return Redacted(text, n_secrets, n_emails)


def secret_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields `(begin, end)` of keys and tokens, as indices of characters, in no order; they may overlap.

    Of a password in an address only the password is in the span; other secrets reach to the end of their token.
    """
    lowered = text.lower()
    for words, plugin in _plugins():
        if words and not any(word in lowered for word in words):
            continue

        is_valid = getattr(plugin, "is_formally_valid", lambda token: True)  # only of JSON web tokens
        is_password = type(plugin).__name__ == "BasicAuthDetector"
        for pattern in plugin.denylist:
            for match in pattern.finditer(text):
                # The secret is the longest group; a short group is only the prefix of a token.
                group = max(range(1, pattern.groups + 1), key=lambda n: len(match.group(n) or ""), default=0)
                secret = match.group(group)
                if is_password and not PASSWORD.fullmatch(secret):
                    continue
                if len(secret) < SHORTEST and not is_password:
                    group = 0

                if is_valid(match.group(group)):
                    begin, end = match.span(group)
                    yield begin, end if is_password else REST.match(text, end).end()  # type: ignore[union-attr]

    if "private" in lowered:
        yield from (match.span() for match in PRIVATE_KEY.finditer(text))


def email_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields `(begin, end)` of e-mail addresses, from first to last."""
    at = text.find("@")
    while at >= 0:
        domain = DOMAIN.match(text, at + 1)
        local = domain and LOCAL.search(text[max(0, at - LONGEST_LOCAL) : at])
        if domain and local and local.group() not in NO_PERSON:
            yield at - len(local.group()), domain.end()
        at = text.find("@", at + 1)


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the spans `(begin, end)` from first to last, those that overlap joined; spans that touch stay apart.

    `spans` is not changed.
    """
    disjoint: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if disjoint and begin < disjoint[-1][1]:
            last_begin, last_end = disjoint[-1]
            disjoint[-1] = (last_begin, max(end, last_end))
        else:
            disjoint.append((begin, end))
    return disjoint


def _replaced(text: str, spans: list[tuple[int, int]], placeholder: str) -> str:
    parts, last = [], 0
    for begin, end in spans:
        parts += [text[last:begin], placeholder]
        last = end
    return "".join([*parts, text[last:]])


@cache
def _plugins() -> list[tuple[tuple[str, ...], Any]]:
    """Returns (words, plugin) of every plugin; a text without any of the words needs no search (no words: always
    search).

    Cached, because their imports take half a second.
    """
    from detect_secrets.plugins.base import RegexBasedDetector

    plugins = []
    for name, words in PLUGINS.items():
        module = import_module(f"detect_secrets.plugins.{name}")
        classes = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
        plugins += [(words, cls()) for cls in classes if issubclass(cls, RegexBasedDetector)]
    return plugins
