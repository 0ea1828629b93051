#!/usr/bin/env bash
# Makes .venv in the checkout once, installs dist_lm into it, and activates it. The other scripts source it, which sets
# `set -euo pipefail` and the directory; to prepare a checkout by hand, run it: bash launch/env.sh
#   DIST_LM_EXTRAS   extras to install ("" for running, "tests", "dev" for tests, lint and types); set by the caller
#   DIST_LM_VENV     an environment of your own, used as it is: nothing is made, installed or removed there
#   PYTHON           interpreter to make .venv with (default: python3.11, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DIST_LM_VENV:-$root/.venv}
extras=${DIST_LM_EXTRAS:-}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; install one, or set PYTHON=/path/to/python3.11" >&2
  return 1
}

# Make .venv and install into it, unless that is done: then the stamp holds the hash of what would be installed.
# A caller may source this file in a condition, where `set -e` is off: steps that can fail return themselves.
install() {
  local stamp=$venv/.dist_lm${extras:+-$extras} making=$venv/.dist_lm-making wanted python
  if [ ! -d "$venv" ] || [ -e "$making" ]; then
    python=$(find_python) || return
    mkdir -p "$venv" || return
    touch "$making" || return # its making may be interrupted
    "$python" -m venv "$venv" || return
    rm "$making" || return
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "error: $venv has no pip, so it was not made by this script: move it away, or set DIST_LM_VENV to it" >&2
    return 2
  fi
  wanted=$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | "$venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') || return
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing dist_lm${extras:+ with extra $extras} into $venv (a minute or two, once)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/launch/constraints.txt" \
      --no-compile --editable "$root${extras:+[$extras]}" || return
    # pip would compile on one core. Files that cannot be compiled are for other Pythons: pip passes over them, too.
    "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
    echo "$wanted" >"$stamp"
  fi
}

if [ -n "${DIST_LM_VENV:-}" ]; then
  if [ ! -f "$venv/bin/activate" ]; then
    echo "error: DIST_LM_VENV=$venv: no Python environment there (no bin/activate)" >&2
    exit 2
  fi
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # the code of this checkout, whatever is installed there
else
  # several machines may begin at once on a shared file system
  if command -v flock >/dev/null && [ -w "${BASH_SOURCE[0]}" ]; then
    exec 9<>"${BASH_SOURCE[0]}"
    flock 9
  fi
  install || exit "$?"
  exec 9>&-
fi
# shellcheck disable=SC1091
. "$venv/bin/activate"
cd "$root"
