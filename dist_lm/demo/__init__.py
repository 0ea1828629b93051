"""What the quick start and the demos read: text of installed wheels, generated SQL and Bash.

`conf/corpus/local.yaml` names the readers of this package by import path, as it would name a reader of your own. No
other package imports it.
"""
