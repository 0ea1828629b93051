"""The resolved configuration as a file: written by the launcher, read by every rank."""

from pathlib import Path

from omegaconf import OmegaConf

from dist_lm.config.generate import schema_of
from dist_lm.config.root import Config
from dist_lm.storage import durable


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    durable.write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote; types and bounds are checked again."""
    loaded = OmegaConf.load(path)
    merged = OmegaConf.merge(OmegaConf.structured(schema_of(loaded.stage.name)), loaded)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config
