"""Whether wandb is online, and what environment its processes get."""

import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from dist_lm.config.tracking import TrackingConfig
from dist_lm.errors import ConfigError
from dist_lm.tracking.redact import without_secrets

LOGIN = ("WANDB_API_KEY", "WANDB_BASE_URL")
# what would have a say in which run it is, and where it is kept: that is ours to say
OURS = ("WANDB_MODE", "WANDB_RESUME", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_SERVICE")


def wandb_mode(tracking: TrackingConfig, environ: Mapping[str, str]) -> str:
    """`online`, `offline` or `disabled`: what tracking.mode and the login on this machine come to.

    `auto` follows WANDB_MODE if that is offline or disabled; else it is online with WANDB_API_KEY or a netrc
    entry for wandb's host, and offline without.

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
    asked = environ.get("WANDB_MODE")
    if asked in ("offline", "disabled"):
        return asked
    return "online" if login else "offline"


def wandb_environment(environ: Mapping[str, str], online: bool) -> dict[str, str]:
    """What the processes of wandb are started with: no secret, but the login where it is online."""
    kept = {name: value for name, value in without_secrets(environ).items() if name not in OURS}
    return kept | {name: environ[name] for name in LOGIN if online and name in environ}


def base_url(environ: Mapping[str, str]) -> str:
    """Where wandb's server is."""
    return environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _netrc_login(environ: Mapping[str, str]) -> bool:
    file = Path(environ.get("NETRC") or Path(environ.get("HOME") or Path.home()) / ".netrc")
    if not file.is_file():
        return False
    try:
        return netrc.netrc(str(file)).authenticators(urlparse(base_url(environ)).hostname or "") is not None
    except netrc.NetrcParseError:
        return False  # wandb could not read it either
