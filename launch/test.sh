#!/usr/bin/env bash
# The tests, in the environment of the quick start plus the `dev` extra. Arguments go to pytest.
#   bash launch/test.sh                    everything
#   bash launch/test.sh tests/model -x     a part
set -euo pipefail
DIST_LM_EXTRAS=dev
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

exec python -m pytest "$@"
