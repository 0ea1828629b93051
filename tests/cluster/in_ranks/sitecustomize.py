"""Imported by Python at the start of processes whose PYTHONPATH has this folder: ranks then import `killing_push`."""

import os
import sys

if "RANK" in os.environ and "dist_lm.train" in sys.orig_argv:
    import tests.cluster.killing_push  # noqa: F401
