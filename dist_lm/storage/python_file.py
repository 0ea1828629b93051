"""Imports a Python file of a user, whatever its name and its folder are."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dist_lm.errors import UserError


class NotPythonError(UserError):
    """Raised for a file that cannot be imported because of its name."""


def load_python_file(file: Path, name: str) -> ModuleType:
    """Imports `file`, which can import modules of its own folder, and returns the module.

    The folder stays in `sys.path`, and the module in `sys.modules`. Errors of the code in `file` reach the caller as
    they are.

    Args:
        name: of the module; the file may have the name of a module that it imports.

    Raises:
        NotPythonError: `file` is not a Python file.
    """
    # The file may import its neighbours by name, as if it were run.
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise NotPythonError("expected a Python file (.py)")

    module = importlib.util.module_from_spec(spec)
    # Pydantic and dataclasses look annotations up in the module, so it must be registered.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
