"""Verbs of `python -m dist_lm` with many options, and the arguments that verbs share."""
