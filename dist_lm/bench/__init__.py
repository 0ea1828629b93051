"""The benchmarks behind `python -m dist_lm bench NAME`, one file each; docs/bench.md says what they compare.

A benchmark is a module with `cases(overrides, quick)`, which says what is compared, and `build(way, config, world)`,
which runs in the ranks and gives the training step to be timed.
"""
