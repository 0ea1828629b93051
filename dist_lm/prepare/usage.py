"""The text of `python -m dist_lm.launch --help`: the choices of each group and the keys, from the configuration itself.

Hydra's own list has every folder of conf/, also recipes that a size or an experiment takes by itself, and no key.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from dist_lm.config.root import Config
from dist_lm.prepare.compose import PIPELINE, own_groups
from dist_lm.prepare.conf_folders import GROUPS, choices
from dist_lm.stages.registry import all_stages

HEAD = """\
dist_lm: train a code model, from raw text to a sampled model, with one command

Usage:  python -m dist_lm.launch stage=STAGE [group=choice] [key=value] ...

  python -m dist_lm.launch stage=code                        everything that is missing, up to a sampled code model
  python -m dist_lm.launch stage=language model=large hardware=h100 cluster.nodes=64 dry_run=true
  python -m dist_lm.launch stage=code stages.language.steps=200 stage.lr=1e-3
"""
FOOT = """\
More:  --cfg job (show the resolved configuration)   --info defaults-tree   dist-lm --help (what is not a stage)
Completion:  eval "$(dist-lm-launch -sc install=bash)"   then press TAB after dist-lm-launch"""
WIDTH = 100  # columns


def usage(overrides: Sequence[str]) -> str:
    """Returns the help of the launcher, in lines of at most 120 columns.

    Args:
        overrides: those that name folders of the user, whose files are choices too.

    Raises:
        ConfigError: a folder of the user cannot be used, or the stage of another package cannot be imported.
    """
    groups = []
    for group in GROUPS:
        accepted = choices(group, overrides)
        if group == "stage":
            accepted.append(PIPELINE)
        elif group == "model":
            accepted.append("hf:SOURCE")
        groups.append(_wrapped(f"{group}: {', '.join(accepted)}"))

    type_of = get_type_hints(Config)
    keys = [f.name for f in fields(Config) if not is_dataclass(type_of[f.name])]
    mappings = [f"{f.name}.*" for f in fields(Config) if is_dataclass(type_of[f.name])]
    lines = [_wrapped(" ".join(keys)), _wrapped("  ".join(mappings))]
    for group, stages in _groups_of_stages().items():
        lines.append(f"  {group}.*".ljust(25) + f"of stage {', '.join(stages)}")
    lines.append("  stages.NAME.KEY=value  sets a key of an earlier stage that this command builds on the way")
    return "\n".join([HEAD, "Groups (group=choice)", *groups, "", "Keys (key=value)", *lines, "", FOOT])


def _groups_of_stages() -> dict[str, list[str]]:
    """Returns the groups of keys that only some stages have: group -> names of these stages."""
    stages_of: dict[str, list[str]] = {}
    for stage in all_stages():
        for group in own_groups(stage.schema):
            stages_of.setdefault(group, []).append(stage.name)
    return stages_of


def _wrapped(text: str) -> str:
    """Returns the text in lines that are indented, broken between words."""
    return textwrap.fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
