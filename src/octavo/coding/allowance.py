"""The memory that reading a file may allocate, checked before anything is allocated."""

from octavo.errors import ArtifactError


class Allowance:
    """A limit on the bytes of memory that reading may allocate.

    Parameters
    ----------
    bytes
        The limit.
    """

    def __init__(self, bytes: int) -> None:
        self.bytes = self._left = bytes
        #: The peak of the bytes that callers stated.
        self.stated = 0

    def take(self, count: int, what: str) -> None:
        """Count bytes that stay allocated.

        Raises
        ------
        ArtifactError
            If fewer bytes are left.
        """
        self.check(count, what)
        self._left -= count

    def check(self, count: int, what: str) -> None:
        """Refuse a temporary allocation that is larger than what is left; it is not counted."""
        if not 0 <= count <= self._left:
            raise ArtifactError(
                f"{what} needs {count} bytes of memory, but {self._left} are left of the {self.bytes} that its shapes "
                "and file sizes justify; nothing was allocated. The file is damaged or was not written by Octavo"
            )
        self.stated = max(self.stated, self.bytes - self._left + count)
