"""The resolved configuration as a file: written by the launcher, read by every rank."""

from pathlib import Path

from omegaconf import OmegaConf

from dist_lm import durable
from dist_lm.config import Config
from dist_lm.generate_config import schema_of


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    durable.write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote; types and bounds are checked again."""
    loaded = OmegaConf.load(path)
    lead = OmegaConf.select(loaded, "stage.lead")
    if OmegaConf.is_dict(lead):  # as written up to version 0.1, which had one at most
        loaded.stage.lead = [lead] if lead.steps else []
    merged = OmegaConf.merge(OmegaConf.structured(schema_of(loaded.stage.name)), loaded)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config
