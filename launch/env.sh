#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv once, installs dist_lm into it, and activates it.
#   DIST_LM_EXTRAS   extras to install ("" for running, "dev" for tests); set by the caller
#   DIST_LM_VENV     where the environment is (default: .venv in the checkout)
#   PYTHON           interpreter to make it with (default: python3.11, else python3)
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

# what is installed is current when the stamp holds the hash of what would be installed
stamp=$venv/.dist_lm${extras:+-$extras}
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # not there, or its making was interrupted
  "$(find_python)" -m venv --clear "$venv"
fi
wanted=$("$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
  "$root/pyproject.toml")
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing dist_lm${extras:+ with extra $extras} into $venv (a minute or two, once)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}"
  echo "$wanted" >"$stamp"
fi
# shellcheck disable=SC1091
. "$venv/bin/activate"
cd "$root"
