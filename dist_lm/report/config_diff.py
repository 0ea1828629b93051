"""What tells configurations apart. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from dist_lm.config.generate import schema_of

ABSENT = "–"
OPEN = "???"  # what OmegaConf calls a value that is missing
NAMES = ("run_id", "work_dir")  # differ by their nature, or are in every heading


@dataclass(frozen=True)
class Row:
    """A key, and what it is in each column; `same`: whether the values are equal."""

    key: str
    values: tuple[str, ...]

    @property
    def same(self) -> bool:
        return len(set(self.values)) == 1


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as text; lists are one value."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: as_text(value)}


def as_text(value: Any) -> str:
    """As it would be written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The keys that are not the same in all of several configurations, in the order of the first."""
    columns = [flat(config) for config in configs]
    keys = dict.fromkeys(key for column in columns for key in column if key not in NAMES)
    rows = [Row(key, tuple(column.get(key, ABSENT) for column in columns)) for key in keys]
    return [row for row in rows if not row.same]


def from_defaults(config: Mapping[str, Any]) -> list[Row]:
    """(key, default, value) of what a configuration sets otherwise than the code, where that does not leave it open."""
    defaults = defaults_of(schema_of(str(config.get("stage", {}).get("name", ""))))
    rows = []
    for key, value in flat(config).items():
        default = defaults.get(key, OPEN)
        if value != default != OPEN and key not in NAMES:
            rows.append(Row(key, (default, value)))
    return rows


def defaults_of(schema: type) -> dict[str, str]:
    """What the code gives each key of a configuration; `OPEN` where it gives none."""
    found = flat(OmegaConf.to_container(OmegaConf.structured(schema)))
    for name, group in get_type_hints(schema).items():
        if is_dataclass(group):
            found |= flat(OmegaConf.to_container(OmegaConf.structured(group)), name)
    return found
