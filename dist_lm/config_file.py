"""The resolved configuration as a file: written by the launcher, read by every rank."""

from pathlib import Path

from omegaconf import OmegaConf

from dist_lm import durable
from dist_lm.config import Config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    durable.write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote; types and bounds are checked again."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config
