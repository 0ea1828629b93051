"""Verbs of `python -m dist_lm` with many options, and the arguments that verbs share.

A verb's docstring is its help text, so it names no errors: `run_program` prints an error that is for the user in one
line, and the exit code is 2. Other exit codes are in the help text.
"""
