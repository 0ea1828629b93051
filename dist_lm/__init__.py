"""dist_lm: train a code model from raw text to RLHF, on a laptop or a cluster, with one command."""

__version__ = "0.1.0"
