#!/usr/bin/env bash
# The tests, in the environment of the quick start plus the `dev` extra. Arguments go to pytest.
#   bash launch/test.sh                    everything that takes less than minutes
#   bash launch/test.sh tests/model -x     a part
#   bash launch/test.sh -m heavy           those that take minutes
#   bash launch/test.sh -m slurm           of these, batch jobs on a real Slurm, which it installs as root on Debian
set -euo pipefail
DIST_LM_EXTRAS=dev
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_slurm() {
  if command -v slurmctld munged ip ss >/dev/null; then return; fi
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 >/dev/null && return
  fi
  echo "left out: the tests on a real Slurm; they need slurm-wlm, munge and iproute2, and root to install or to run them" >&2
}

case " $* " in
*" -m heavy "* | *slurm*) install_slurm ;;
*) echo "left out: tests that take minutes (-m heavy), those on a real Slurm among them (-m slurm)" >&2 ;;
esac
exec python -m pytest "$@"
