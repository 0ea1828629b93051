"""The algorithms that `rlhf.algorithm` names: an import and an entry for each."""

from dist_lm.rlhf.algorithm import Algorithm
from dist_lm.rlhf.algorithms.dapo import Dapo
from dist_lm.rlhf.algorithms.dr_grpo import DrGrpo
from dist_lm.rlhf.algorithms.grpo import Grpo
from dist_lm.rlhf.algorithms.gspo import Gspo
from dist_lm.rlhf.algorithms.ppo import Ppo
from dist_lm.rlhf.algorithms.reinforce_pp import ReinforcePp
from dist_lm.rlhf.algorithms.rloo import Rloo

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": Ppo,
    "grpo": Grpo,
    "dr_grpo": DrGrpo,
    "rloo": Rloo,
    "reinforce_pp": ReinforcePp,
    "dapo": Dapo,
    "gspo": Gspo,
}
