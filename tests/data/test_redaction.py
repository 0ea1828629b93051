"""Secrets and addresses: found where they are, and no code around them is touched."""

import json
import multiprocessing
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_lm.data.redaction import EMAIL, KEY, redacted, redacted_json

B64 = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
PEM = "\n".join(["-----BEGIN RSA PRIVATE KEY-----", *["MIIEpAIBAAKCAQEA" * 4] * 6, "-----END RSA PRIVATE KEY-----"])
# a secret, and the text around it
SECRETS = {
    "aws key": ("AKIAIOSFODNN7EXAMPLE", "id = '{}'"),
    "aws secret": (B64, "aws_secret_access_key = '{}'"),
    "github": ("ghp_" + "a1B2" * 9, "token: {}\n"),
    "gitlab": ("glpat-" + "x9Y" * 8, "{} "),
    "slack": ("xoxb-123456789012-abcdefghij12", "slack({})"),
    "stripe": ("sk_live_" + "a1" * 12, "key={}"),
    "openai": ("sk-" + "a1" * 10 + "T3BlbkFJ" + "b2" * 10, "'{}'"),
    "sendgrid": ("SG." + "a" * 22 + "." + "b" * 43, "'{}'"),
    "npm": ("npm_" + "a1" * 18, "//registry.npmjs.org/:_authToken={}"),
    "pypi": ("pypi-AgEIcHlwaS5vcmc" + "a1" * 40, "{}"),
    "twilio": ("SK" + "a1" * 16, "'{}'"),
    "telegram": ("110201543:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsawQ", "'{}'"),
    "jwt": (
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        "Bearer {}",
    ),
    "password in an address": ("hunter2", "postgres://bob:{}@db.internal/x"),
    "private key": (PEM, "key = '''{}'''\nx = 1\n"),
    "private key in lines of code": (PEM.replace("\n", '\\n"\n    "'), 'key = ("{}")\n'),
}
CODE = [
    "y = x@self.weight.to(device) + a@b.T\n",
    "@pytest.mark.parametrize('a', [1])\ndef f(): ...\n",
    "git@github.com:owner/name.git",
    "url = f'://{host}:{port}@{x}'; re.compile('https?://[^:]+:[^@]+@')",
    "sha = 'da39a3ee5e6b4b0d3255bfef95601890afd80709'",
    "A discussion of BEGIN RSA PRIVATE KEY blocks",
    "https://example.com/path:with/colons and more",
]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_replaced_and_the_text_around_it_stays(name):
    secret, around = SECRETS[name]
    text = f"# first line\n{around.format(secret)}\nlast line\n"
    assert redacted(text, secrets=True, emails=True) == (text.replace(secret, "<KEY>"), 1, 0)
    assert redacted(text, secrets=False, emails=False) == (text, 0, 0)


def test_addresses_are_replaced():
    text = "Bob <bob.smith+x@mail.example.co.uk>, ann@example.org; x@y"
    assert redacted(text, secrets=True, emails=True) == ("Bob <<EMAIL>>, <EMAIL>; x@y", 0, 2)
    assert redacted(text, secrets=True, emails=False) == (text, 0, 0)


@pytest.mark.parametrize("text", CODE)
def test_code_that_looks_alike_stays(text):
    assert redacted(text, secrets=True, emails=True) == (text, 0, 0)


@pytest.mark.parametrize("name", SECRETS)
def test_the_text_of_a_conversation_stays_json(name):
    secret, around = SECRETS[name]
    value = [{"a": around.format(secret)}, {"b": "mail bob@example.com", "c": "http://x.y", "d": "e:f@g", "é": 1.5}]
    text = json.dumps(value, ensure_ascii=False)
    found = redacted_json(text, secrets=True, emails=True)
    expected = [{"a": around.format("<KEY>")}, value[1] | {"b": "mail <EMAIL>"}]
    assert found == (json.dumps(expected, ensure_ascii=False), 1, 1)
    assert redacted_json(text, secrets=False, emails=False) == (text, 0, 0)


@pytest.mark.parametrize("before", ["\n", "\t", "\\", "\\n", '"', "Write to:\r\n"])
@pytest.mark.parametrize("secret", ["bob@example.com", "AKIAIOSFODNN7EXAMPLE"])
def test_escapes_of_json_are_no_part_of_a_secret(before, secret):
    found = redacted_json(json.dumps({"a": f"{before}{secret} now"}), secrets=True, emails=True)
    placeholder = EMAIL if "@" in secret else KEY
    if before == "\\n":  # these are letters
        assert json.loads(found.text)["a"].startswith("\\")
    else:
        assert json.loads(found.text) == {"a": f"{before}{placeholder} now"}


def _many(number: int) -> int:
    text = "\n".join(around.format(secret) for secret, around in SECRETS.values())
    return redacted(text, secrets=True, emails=True).secrets


def test_nothing_is_verified_and_threads_and_forks_find_the_same(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    expected = _many(0)
    assert expected >= len(SECRETS) - 1
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(_many, range(16))) == {expected}
    monkeypatch.undo()
    with multiprocessing.get_context("fork").Pool(2) as forks:
        assert set(forks.map(_many, range(4))) == {expected}
