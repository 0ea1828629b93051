"""Errors of the server: a refused request as an exception, and any error in OpenAI's form."""

from typing import Any

from dist_lm.errors import UserError


class ProtocolError(UserError):
    """A request that is refused: its HTTP status, the field, and OpenAI's code."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def error_value(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
