"""wandb's login: whether runs are sent, and the environment of wandb's processes."""

import configparser
import logging
import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from dist_lm.config.root import TrackingConfig
from dist_lm.errors import ConfigError
from dist_lm.tracking.redact import without_secrets

log = logging.getLogger(__name__)
LOGIN = ("WANDB_API_KEY", "WANDB_BASE_URL")

# These variables would override the identity and the folder of the run.
OURS = ("WANDB_MODE", "WANDB_RESUME", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_SERVICE")


def wandb_mode(tracking: TrackingConfig, environ: Mapping[str, str]) -> str:
    """Returns `online`, `offline` or `disabled`, from tracking.mode and the login of this machine.

    `offline` and `online` are taken as they are. `auto` follows WANDB_MODE=offline and disabled; otherwise it is online
    with WANDB_API_KEY or a netrc entry for wandb's host, and offline without. A netrc or settings file that cannot be
    read is logged and counts as absent.

    Raises:
        ConfigError: tracking.mode=online without a login (wandb would ask for a key and wait).
    """
    if tracking.mode == "offline":
        return "offline"

    login = bool(environ.get("WANDB_API_KEY")) or _netrc_login(environ)
    if tracking.mode == "online":
        if not login:
            raise ConfigError(
                "tracking.mode=online: no wandb login here: set WANDB_API_KEY, run `wandb login`, "
                "or use tracking.mode=auto"
            )
        return "online"

    # With tracking.mode=auto, wandb's own variable decides before the login does.
    requested = environ.get("WANDB_MODE")
    if requested in ("offline", "disabled"):
        return requested
    return "online" if login else "offline"


def wandb_environment(environ: Mapping[str, str], online: bool) -> dict[str, str]:
    """Returns the environment of wandb's processes: it holds no secret, except the login if runs are sent."""
    # wandb's own processes need the network login and nothing else of this machine.
    harmless = {name: value for name, value in without_secrets(environ).items() if name not in OURS}
    if not online:
        return harmless
    return harmless | {name: environ[name] for name in LOGIN if name in environ}


def base_url(environ: Mapping[str, str]) -> str:
    """Returns the address of wandb's server: WANDB_BASE_URL, else that of `wandb login --host`, else wandb's own."""
    return environ.get("WANDB_BASE_URL") or _saved_base_url(environ) or "https://api.wandb.ai"


def _saved_base_url(environ: Mapping[str, str]) -> str:
    """Returns the address that `wandb login --host` wrote to the user's settings file; empty if there is none, or if
    the file cannot be read, which is logged."""
    folder = Path(environ.get("WANDB_CONFIG_DIR") or _home(environ) / ".config" / "wandb")
    file = folder.expanduser() / "settings"

    settings = configparser.ConfigParser()
    try:
        settings.read_string(file.read_text(encoding="utf-8"))
        return settings.get("default", "base_url", fallback="")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # Wandb treats such a file as empty.
        _warn(file, error)
        return ""


def _netrc_login(environ: Mapping[str, str]) -> bool:
    """Returns whether the user's netrc file has a key for wandb's server; False if there is no file, or if it cannot be
    read, which is logged."""
    file = Path(environ.get("NETRC") or _home(environ) / ".netrc").expanduser()
    # With the port: `wandb login` writes it so.
    host = urlparse(base_url(environ)).netloc

    try:
        login = netrc.netrc(str(file)).authenticators(host)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError) as error:
        # Wandb cannot read it either.
        _warn(file, error)
        return False

    return login is not None and bool(login[2])


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or Path.home())


def _warn(file: Path, error: Exception) -> None:
    """Names the file and the kind of error; its text may quote a secret of the file."""
    log.warning("%s cannot be read (%s), so wandb does without it", file, type(error).__name__)
