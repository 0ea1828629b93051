"""A configuration that holds a secret is refused, by a message that does not hold it."""

import pytest

from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import check_no_secrets, compose_config

SESAME = "opensesame"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"tracking.tags=['https://me:{SESAME}@hub.example.org/x']", "tracking.tags"),
        (f"stage.init_from='s3://me:{SESAME}@store/run'", "stage.init_from"),
        (f"work_dir='ftp://{SESAME}@store/work'", "work_dir"),
        ("run_id=${oc.env:HF_TOKEN}", "run_id"),
        ("tracking.entity=team-${oc.env:HF_TOKEN}", "tracking.entity"),
    ],
)
def test_a_secret_in_a_value_is_refused(monkeypatch, override, key):
    monkeypatch.setenv("HF_TOKEN", SESAME)
    with pytest.raises(ConfigError) as refused:
        compose_config(["stage=code", override])
    assert str(refused.value).startswith(f"{key}=(")
    assert SESAME not in str(refused.value)


@pytest.mark.parametrize(
    "override", [f"hf_token={SESAME}", f"+api.key={SESAME}", f"stage.password={SESAME}", f"stage.api_key={SESAME}"]
)
def test_a_secret_under_a_key_that_does_not_exist_is_not_repeated(override):
    with pytest.raises(ConfigError) as refused:
        compose_config(["stage=code", override])
    assert SESAME not in str(refused.value)


def test_names_of_the_users_own_are_looked_at_too():
    with pytest.raises(ConfigError, match=r"rewards\.judge\.api_key=\(a secret\)"):
        check_no_secrets({"rewards": {"judge": {"api_key": SESAME}}}, {})
    with pytest.raises(ConfigError, match=r"mix=\(an address"):
        check_no_secrets({"mix": {f"https://me:{SESAME}@host": 0.1}}, {})


@pytest.mark.parametrize("name", ["HFTOKEN", "GITHUBTOKEN", "DBPASS", "DATABASE_DSN", "SLACK_WEBHOOK_URL"])
def test_secrets_of_variables_with_other_names(name):
    with pytest.raises(ConfigError, match=name):
        check_no_secrets({"tracking": {"entity": f"team-{SESAME}"}}, {name: SESAME})


def test_where_a_secret_is_kept_is_none():
    place = "/home/me/.ray/auth_token"
    check_no_secrets({"cluster": {"token_path": place}}, {"RAY_AUTH_TOKEN_PATH": place, "API_KEY_FILE": place})
    check_no_secrets({"work_dir": "/home/me/work"}, {"APPTAINER_PWD": "/home/me", "PWD": "/home/me"})


def test_what_is_no_secret_passes():
    harmless = {"path": "https://hub.example.org/data", "stop": ["a@b"], "tokens": 3, "api_key": "", "run_id": "key"}
    check_no_secrets(harmless, {"SSH_KEY": "run", "EMPTY_TOKEN": "", "HOME": "/root"})
