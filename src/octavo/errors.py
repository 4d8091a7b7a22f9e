"""Every error a caller of Octavo may see.

All of them derive from :class:`OctavoError`, so ``except octavo.OctavoError`` is enough. Messages
say what was wrong, where (file, site, shape, value) and what to do about it.
"""


class OctavoError(Exception):
    """Root of all errors raised on purpose by Octavo. The command line exits with 1."""

    exit_code = 1


class RequestError(OctavoError, ValueError):
    """A request or an input that cannot be served as stated. The command line exits with 2."""

    exit_code = 2


class DivergedError(RequestError):
    """A training whose loss is not finite, most likely for a learning rate that is too large."""


class BudgetError(OctavoError):
    """The stated size cannot be reached. The command line exits with 3.

    Attributes
    ----------
    limit : float
        The largest ratio that can be reached.
    """

    exit_code = 3

    def __init__(self, message: str, limit: float) -> None:
        super().__init__(message)
        self.limit = limit


class ArtifactError(OctavoError):
    """An artifact that is damaged, truncated, of an unknown version, or not one at all."""


class MissingExtraError(OctavoError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""
