#!/usr/bin/env bash
# The tests, in the environment of the quick start plus the extra `tests`, or `dev` where a browser takes part.
# Arguments go to pytest.
#   bash launch/test.sh                    the small size: minutes on two cores
#   bash launch/test.sh --all              everything but `bars`: heavy tests, Slurm and CUDA code on fake tensors too
#   bash launch/test.sh tests/model -x     a part
#   bash launch/test.sh -m heavy           those that take minutes
#   bash launch/test.sh -m slurm           of these, batch jobs on a real Slurm, which it installs as root on Debian
#   bash launch/test.sh tests/cuda         CUDA code on fake tensors, without a GPU; needs g++, installs triton
#   bash launch/test.sh -m bars            further rows of what others assert: layouts, families, seeds, kills (hours)
set -euo pipefail
# Some images set it: then each of thousands of processes would compile the package and its tests anew.
unset PYTHONDONTWRITEBYTECODE
case " $* " in
*tests/cuda* | *" --all "*) DIST_LM_EXTRAS=dev,cuda-tests ;; # triton, whose compiler needs no GPU
*heavy* | *tests/report*) DIST_LM_EXTRAS=dev ;;
*) DIST_LM_EXTRAS=tests ;;
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
*" --all "* | *heavy* | *tests/report*) install_chromium ;;
esac
case " $* " in
*" --all "* | *" -m heavy "* | *" -m bars "* | *slurm*) install_slurm ;;
*) echo "left out: tests that take minutes (--all), those on a real Slurm among them, and long ones (-m bars)" >&2 ;;
esac
if [ "$#" -gt 0 ] && [ "$*" != --all ]; then exec python -m pytest "$@"; fi

# A lane runs one test after the other, beside the other lanes: together they use two cores fully. Its output follows
# when it has ended.
set -m # or the shell would have lanes ignore Ctrl-C, which some of them test
logs=$(mktemp -d)
pids=() names=() failed=0
trap end_lanes EXIT

lane() { # NAME COMMAND...
  names+=("$1")
  "${@:2}" >"$logs/${#pids[@]}" 2>&1 &
  pids+=("$!")
}

wait_for_lanes() {
  local number
  for number in "${!pids[@]}"; do
    wait "${pids[number]}" || failed=$?
    echo "== ${names[number]} ($SECONDS s)"
    cat "$logs/$number"
  done
  pids=() names=()
}

# shellcheck disable=SC2317 # the trap calls it
end_lanes() { # of a suite that was interrupted or failed
  local pid
  for pid in "${pids[@]}"; do
    if kill -INT -- "-$pid" 2>/dev/null; then wait "$pid" || true; fi
  done
  rm -rf "$logs"
}

heavy_of_several_processes() { # FILE...
  python -m pytest "$@" -m "heavy and cluster and not slurm and not bars"
}

# shellcheck disable=SC2317 # a lane calls it
cuda_then() { # FILE...
  local failed=0
  python -m pytest tests/cuda || failed=$?
  heavy_of_several_processes "$@" || failed=$?
  return "$failed"
}

# Each worker imports what it collects: files without tests of a mark are left out.
mapfile -t of_several_processes < <(grep -rl --include='test_*.py' 'mark\.cluster' tests | sort -r) # the dearest comes first
mapfile -t heavy < <(grep -rl --include='test_*.py' 'mark\.heavy' tests | sort)

# These mostly wait for processes to start, so two of them run side by side; a file keeps its runs and its Ray. Some of
# the others wait, too: four of them fill two cores.
lane "tests of several processes" \
  python -m pytest -n 2 --dist loadfile "${of_several_processes[@]}" -m "cluster and not heavy and not bars"
python -m pytest -n 4 --dist worksteal -m "not cluster and not heavy and not bars and not cuda" || failed=$?
wait_for_lanes
if [ "$*" = --all ]; then
  lane "Slurm, which mostly waits" python -m pytest -s tests/slurm -m "slurm and not bars"
  # Tests of several processes take two lanes, the second of which follows the shortest of the others.
  half=$((${#of_several_processes[@]} / 2))
  lane "CUDA code on fake tensors, then heavy tests of several processes" cuda_then "${of_several_processes[@]:half}"
  lane "heavy tests of one process" \
    python -m pytest -n 2 --dist worksteal "${heavy[@]}" -m "heavy and not cluster and not slurm and not bars"
  echo "== heavy tests of several processes ($SECONDS s)"
  heavy_of_several_processes "${of_several_processes[@]:0:half}" || failed=$?
  wait_for_lanes
fi
echo "== all of it ($SECONDS s)"
exit "$failed"
