"""The one error type for a user's mistakes."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave, said in one line: where, what came, what to do."""
