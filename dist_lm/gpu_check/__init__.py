"""`dist-lm gpu check`: the checks of docs/gpu.md, each in processes of its own, with a time limit.

`checks` lists them, `run` runs them one after the other, `probe` is the program of one check, `results` stores the
outcomes and writes the table of docs/gpu.md. A check is a function of a `Probe`; it raises if something is wrong.
"""
