"""What this room refuses, and nothing else."""

from dist_lm.errors import UserError


class ChatError(UserError):
    """A conversation that is not well formed, or tokens that are not one; the message names the turn or the token."""
