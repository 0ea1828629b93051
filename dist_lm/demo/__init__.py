"""The text of the quick start and the demos: text of installed wheels, generated SQL and Bash.

`conf/corpus/local.yaml` names the readers of this package by import path, in the same way as a reader of your own. No
other package imports this one.
"""
