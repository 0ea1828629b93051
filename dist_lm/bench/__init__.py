"""The benchmarks behind `python -m dist_lm bench NAME`; docs/bench.md says what they compare.

A benchmark has `cases(overrides, quick)`, which says what is compared, and `build(variant, config, world)`, which runs
in the ranks and returns the training step to time (`case.Benchmark`). `run.BENCHMARKS` lists them.
"""
