#!/usr/bin/env bash
# From nothing to a code model that calls functions and earns more reward, on this machine: no account, no GPU, and no
# network beyond a package index. A second run reuses what is there.
#
#   bash launch/quickstart.sh [key=value ...]      e.g.  work_dir=/tmp/work  run_id=second
#
# 1. An environment: .venv in this checkout.
# 2. One command plans and runs eight stages at model=nano, about ten minutes on two cores with the installation:
#      tokenizer   a BPE of 4,096 pieces from Python, English, Bash and SQL
#      shards      the same text as webdataset tars of tokens
#      language    next-token training on English, two torchrun ranks under a local Ray
#      code        the same on programs, from the language checkpoint
#      tools       conversations in which functions are called, from the code checkpoint
#      rankings    that model's own completions, ranked by rules
#      reward      a reward model, trained on those rankings
#      rlhf        PPO against the reward model, rollouts on a Ray actor; ends with rollouts and the win rate
#    The text comes from the installed packages and from generators: it is the same on every machine.
# 3. Samples, the curve of each stage, and commands to go on with are printed. experiment=thorough takes longer and
#    learns more.
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

exec python -m dist_lm.launch stage=rlhf model=nano "$@"
