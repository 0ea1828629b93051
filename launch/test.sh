#!/usr/bin/env bash
# The tests, in the environment of the quick start plus the `dev` extra. Arguments go to pytest.
#   bash launch/test.sh                    everything that takes less than minutes, on two cores
#   bash launch/test.sh tests/model -x     a part
#   bash launch/test.sh -m heavy           those that take minutes
#   bash launch/test.sh -m slurm           of these, batch jobs on a real Slurm, which it installs as root on Debian
#   bash launch/test.sh tests/cuda         CUDA code on fake tensors, without a GPU; needs g++, installs triton
#   bash launch/test.sh -m bars            what some of them assert, at length: many seeds, kills, schedules (an hour)
set -euo pipefail
DIST_LM_EXTRAS=dev
case " $* " in
*tests/cuda*) DIST_LM_EXTRAS=dev,cuda-tests ;; # triton, whose compiler needs no GPU
esac
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

has_all() { # `command -v` of several names succeeds if one of them is there
  local name
  for name in "$@"; do
    command -v "$name" >/dev/null || return
  done
}

install_slurm() {
  if has_all slurmctld munged ip ss; then return; fi
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 >/dev/null && return
  fi
  echo "left out: the tests on a real Slurm; they need slurm-wlm, munge and iproute2, and root to install or to run them" >&2
}

# playwright's own browsers are not fetched: the tests use the one of the system
install_chromium() {
  if command -v chromium chromium-browser google-chrome >/dev/null; then return; fi
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null && return
  fi
  echo "left out: the tests of the report in a browser; they need chromium, and root to install it" >&2
}

install_bubblewrap() {
  if command -v bwrap >/dev/null; then return; fi
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends bubblewrap >/dev/null && return
  fi
  echo "left out: the tests of the sandbox; they need bubblewrap, and root to install it" >&2
}

install_bubblewrap
case " $* " in
*heavy* | *tests/report*) install_chromium ;;
esac
case " $* " in
*" -m heavy "* | *" -m bars "* | *slurm*) install_slurm ;;
*) echo "left out: tests that take minutes (-m heavy), those on a real Slurm among them (-m slurm), and long ones (-m bars)" >&2 ;;
esac
if [ "$#" -gt 0 ]; then exec python -m pytest "$@"; fi

# tests of several processes, one after the other, beside the others in two processes: together they use two cores fully
set -m # or the shell would have those in the background ignore Ctrl-C, which some of them test
log=$(mktemp)
python -m pytest -m "cluster and not heavy and not bars" >"$log" 2>&1 &
cluster=$!
trap 'if kill -INT "$cluster" 2>/dev/null; then wait "$cluster" || true; fi; rm -f "$log"' EXIT
failed=0
python -m pytest -n 2 --dist worksteal -m "not cluster and not heavy and not bars and not cuda" || failed=$?
echo "== tests of several processes"
wait "$cluster" || failed=$?
cat "$log"
exit "$failed"
