"""Rates of the groups of parameters as multiples of `stage.lr`, and the momentum of Muon: functions of the settings.

    rate of a group = stage.lr x stage.rates.GROUP x (factor of the width) x (factor of Muon's scale)

The factor of the width keeps the change of every activation per step independent of `d_model`, so the best rate does
too. It is 1 without `model.base_width`; otherwise, with m = d_model / base_width:

| group | AdamW (Yang & Hu 2022, table 3) | Muon, scale unit | Muon, scale adamw |
| --- | --- | --- | --- |
| embedding, vectors | 1 | | |
| head | 1 / m | | |
| matrices of the feed-forward network | 1 / m | 1 | m^-1/2 |
| matrices of attention | 1 / m | m^-1/2 | 1 / m |

Muon's factors follow from the spectral condition (Yang, Simon & Bernstein 2023, condition 1): the spectral norm of an
update must be about sqrt(outputs / inputs). The matrices of attention are those of single heads, whose width is the
same at every d_model, so this norm falls with the root of d_model.
"""

import math

from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import ADAMW, MuonConfig, StageConfig
from dist_lm.model.size import ADAPTERS, is_matrix, parameter_shapes

RMS_OF_ADAMW = 0.2  # of the entries of an update of AdamW (Liu et al. 2025, section 2.2)


def rate_group(name: str) -> str | None:
    """The key of `stage.rates` that a parameter belongs to; None: an adapter, which has the rate `stage.lr`."""
    if ADAPTERS in name:
        return None
    if name.startswith(("lm_head.", "scalar_head.")):
        return "head"
    if name.startswith("embedding."):
        return "embedding"
    return "matrices" if is_matrix(name) else "vectors"


def rate_ratio(name: str, stage: StageConfig, muon: MuonConfig | None, model: ModelConfig) -> float:
    """Learning rate of a parameter as a multiple of `stage.lr`.

    Args:
        muon: of a matrix that Muon steps; None: AdamW steps it.
    """
    group = rate_group(name)
    if group is None:
        return 1.0
    ratio = getattr(stage.rates, group)
    if muon is None:
        return ratio / model.relative_width if group in ("head", "matrices") else ratio
    if muon.lr is not None:
        ratio *= muon.lr / stage.lr
    width_power = 0.5 if "attention." in name else 0.0
    if muon.scale == ADAMW:
        # singular values of 1 are entries of 1 / sqrt(larger side) (Liu et al. 2025, equation 4)
        ratio *= RMS_OF_ADAMW * math.sqrt(max(parameter_shapes(model)[name][-2:]))
        width_power += 0.5
    return ratio / model.relative_width**width_power


def muon_momentum(stage: StageConfig, step: int) -> float:
    """The momentum of Muon at a 0-based step: a linear warm-up from `momentum_low`, and a linear cool-down to it, which
    the last step reaches."""
    muon = stage.muon
    rise = step / muon.momentum_warmup_steps if step < muon.momentum_warmup_steps else 1.0
    left, cooldown = max(0, stage.steps - 1 - step), muon.momentum_cooldown_steps
    fall = left / cooldown if left < cooldown else 1.0
    return muon.momentum - (1 - min(rise, fall)) * (muon.momentum - muon.momentum_low)
