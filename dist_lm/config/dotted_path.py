"""A user's function, named by import path."""

import importlib
from collections.abc import Callable
from typing import Any

from dist_lm.errors import ConfigError


def imported_function(path: str, key: str) -> Callable[..., Any]:
    """The function that `key` names.

    Args:
        path: 'package.module:name'.

    Raises:
        ConfigError: the path cannot be imported, or is not a function.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module may raise anything when it is imported
        raise ConfigError(f"{key}={path}: cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise ConfigError(f"{key}={path}: expected a function, found {function!r}")
    return function
