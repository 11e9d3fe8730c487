"""Errors that a user can cause. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

PEER_LOST = 71
"""Exit code of a rank that ends only because another one did."""


class DsakvError(Exception):
    """Something outside the program went wrong: disk, network, a missing package, output that exists.

    ``message`` says what is wrong, ``hint`` what to do next; each is one line. The command line
    prints both and leaves with ``exit_code``.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[DsakvError], tuple[str, str]]:
        """Errors cross from worker processes; by default only ``message`` would."""
        return type(self), (self.message, self.hint)


class InputError(DsakvError):
    """The user's flags, configuration or input data are wrong."""

    exit_code = 2


class PeerLostError(DsakvError):
    """Another rank is gone, and with it this one's work. Which, and why, whoever started the ranks can say."""

    exit_code = PEER_LOST
