"""Keys that earlier versions had: dropped or renamed when an old config.yaml is read, refused on a command line.

A key that is removed or renamed gets a line in `RENAMED`, and nothing else has to know its old name.
"""

from collections.abc import Mapping
from typing import Any

# Earlier versions refused other values than the default of these keys of text in stages that read rankings.
_OF_TEXT: Mapping[str, str] = dict.fromkeys(
    ("stage.mix", "stage.label_smoothing", "stage.z_loss", "stage.document_mask", "stage.reset_positions"), ""
)

RENAMED: Mapping[str, Mapping[str, str]] = {
    "preference": _OF_TEXT,
    "reward": _OF_TEXT,
    "rlhf": {
        # Earlier versions gave stage rlhf the keys of stages that train on sequences, and read none of these.
        **_OF_TEXT,
        "stage.lr": "rlhf.lr",
        "stage.min_lr_ratio": "rlhf.min_lr_ratio",
        "stage.warmup_steps": "rlhf.warmup_iterations",
        "stage.weight_decay": "rlhf.weight_decay",
        "stage.beta1": "rlhf.beta1",
        "stage.beta2": "rlhf.beta2",
        "stage.adam_eps": "rlhf.adam_eps",
        "stage.grad_clip": "rlhf.grad_clip",
        "stage.max_nonfinite_steps": "rlhf.max_nonfinite_updates",
        "stage.global_batch": "rlhf.prompts",
        "stage.micro_batch": "rlhf.micro_batch_tokens",
        "stage.seq_len": "rlhf.max_new_tokens",
        "stage.mix": "rlhf.pretrain_mix",
        **dict.fromkeys(("stage.schedule", "stage.decay_steps", "stage.decay", "stage.decay_share"), ""),
        **dict.fromkeys(("stage.rates", "stage.muon", "stage.ema_decay", "stage.branch_from"), ""),
        "rlhf.name": "",
        **dict.fromkeys(("stage.dropout", "stage.eval_at_start", "stage.eval_sequences"), ""),
    },
}
"""Stage -> former key -> the key that has its meaning now; empty: no key has."""


def with_present_keys(content: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Returns the content of a config.yaml under the keys of this version.

    The value of a renamed key is taken over unless the file has the present key too, which then decides.
    """
    present = _copied(content)
    for former, key in RENAMED.get(stage, {}).items():
        value = _popped(present, former)
        if value is not _MISSING and key:
            _set_missing(present, key, value)
    return present


def present_key(key: str, stage: str) -> str | None:
    """Returns the key of this version that has the meaning of `key`, or of the group that `key` is in.

    Returns:
        Empty if no key has that meaning any more, None if `key` is no former key of the stage.
    """
    for former, present in RENAMED.get(stage, {}).items():
        if key == former or key.startswith(f"{former}."):
            return present
    return None


_MISSING = object()


def _copied(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    return {key: _copied(value) for key, value in content.items()}


def _popped(content: dict[str, Any], key: str) -> Any:
    """Removes `key` from nested mappings. Returns its value, or `_MISSING`."""
    *groups, name = key.split(".")
    for group in groups:
        content = content.get(group, {})
    return content.pop(name, _MISSING)


def _set_missing(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets `key` in nested mappings unless it is there."""
    *groups, name = key.split(".")
    for group in groups:
        content = content.setdefault(group, {})
    content.setdefault(name, value)
