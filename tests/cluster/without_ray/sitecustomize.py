"""Imported by Python at the start of processes whose PYTHONPATH has this folder: they cannot import Ray."""

import sys


class NoRay:
    """A finder that refuses Ray, as if it was not installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")


sys.meta_path.insert(0, NoRay)  # type: ignore[arg-type]
