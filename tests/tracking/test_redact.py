"""Secrets are recognised by name or in URLs; what only looks like one stays."""

import pytest

from dist_lm.tracking.redact import is_secret_name, redact, redact_command, redact_text, without_secrets


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF_TOKEN", "WANDB_API_KEY", "apiKey", "corpus.api-key", "password", "AWS_SECRET_ACCESS_KEY",
     "RAY_AUTH_TOKEN_PATH", "AWS_ACCESS_KEY_ID", "DB_PASS", "DB_PWD", "db-pass", "AUTH", "BEARER", "hub.auth",
     "HFTOKEN", "hftoken", "GITHUBTOKEN", "DBPASS", "DBPWD", "DBPASSWORD", "CLIENTSECRET", "OPENAIKEY", "SSHKEYID",
     "DATABASE_DSN", "dsn", "SLACK_WEBHOOK", "SLACK_WEBHOOK_URL", "slackWebhookUrl", "AZURE_CONNECTION_STRING"],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.heavy
def test_a_name_without_end_is_judged_too() -> None:
    """The time grew with the square of the length: 8,000 capitals, such as a key of somebody's YAML, took seconds."""
    assert is_secret_name("A" * 1_000_000 + "KEY")
    assert not is_secret_name("A" * 1_000_000)


@pytest.mark.parametrize(
    "name",
    [
        "max_new_tokens",
        "token_path",
        "bytes_per_token",
        "flopsPerToken",
        "TOKENIZERS_PARALLELISM",
        "keyboard",
        "train/tokens",
        "monkey",
        "PWD",
        "OLDPWD",
        "SSH_AUTH_SOCK",
        "author",
        "compass",
        "BYPASS",
        "DOWNPASS",
        "OLD_MONKEY",
        "HOTKEY",
        "KEYS_URL",
        "base_url",
        "APPTAINER_CWD",
        "code/pass@1",
        "code_pass_1",
        "forward_passes",
        "",
    ],
)
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


def test_a_tree_is_redacted_without_being_changed() -> None:
    config = {
        "hub": {"token": "hf_abc", "url": "https://me:pass@example.org/x", "limit": 3},
        "lists": [{"password": "p"}, "plain"],
        "token": None,
        "api_key": "",
    }
    redacted = redact(config)
    assert redacted == {
        "hub": {"token": "***", "url": "https://***@example.org/x", "limit": 3},
        "lists": [{"password": "***"}, "plain"],
        "token": None,
        "api_key": "",
    }
    assert config["hub"]["token"] == "hf_abc"


def test_a_command_line_is_redacted() -> None:
    command = ["dist-lm", "+hub.token=abc", "--api-key", "abc", "--api-key=abc", "stage=code", "git=ssh://u:p@host/x"]
    assert redact_command(command) == [
        "dist-lm",
        "+hub.token=***",
        "--api-key",
        "***",
        "--api-key=***",
        "stage=code",
        "git=ssh://***@host/x",
    ]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://u:p@ss@host/x", "https://***@host/x"),
        ("https://u:p@@host", "https://***@host"),
        ("https://u:p@host/@a b@c ssh://a@b", "https://***@host/@a b@c ssh://***@b"),
        ("https://host/x@y me@host", "https://host/x@y me@host"),
    ],
)
def test_credentials_end_at_the_last_at_of_the_host(text: str, safe: str) -> None:
    assert redact_text(text) == safe


def test_an_environment_loses_its_secrets_only() -> None:
    environ = {"PATH": "/bin", "WANDB_API_KEY": "x", "RAY_AUTH_MODE": "token", "HF_TOKEN": "x", "HOME": "/root"}
    assert without_secrets(environ) == {"PATH": "/bin", "HOME": "/root"}
    proxy = {"https_proxy": "http://me:pass@proxy:3128"}
    assert without_secrets(proxy | {"DATABASE_URL": "postgres://me:pass@db/x"}) == proxy


def test_a_long_word_is_looked_through_in_no_time() -> None:
    word = "x" * 1_000_000
    assert redact({"text": f"{word} https://me:pass@host/"}) == {"text": f"{word} https://***@host/"}
