"""The stages: one object each, with the program of its ranks in the same folder."""
