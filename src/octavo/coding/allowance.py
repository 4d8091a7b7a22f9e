"""How much memory may be taken for what a file asks for, agreed before any is taken."""

from octavo.errors import ArtifactError


class Allowance:
    """Bytes of memory that reading something may take.

    Parameters
    ----------
    bytes
        How many there are at the start.
    """

    def __init__(self, bytes: int) -> None:
        self.bytes = self._left = bytes
        #: The most that was taken at a time, as far as it was stated.
        self.stated = 0

    def take(self, count: int, what: str) -> None:
        """Count bytes that stay taken.

        Raises
        ------
        ArtifactError
            If so many are not left.
        """
        self.check(count, what)
        self._left -= count

    def check(self, count: int, what: str) -> None:
        """Refuse what needs more bytes for a while than are left; they are not counted."""
        if not 0 <= count <= self._left:
            raise ArtifactError(
                f"{what} takes {count} bytes of memory, and {self._left} are left of the {self.bytes} that the shapes "
                "and the size of the files justify; refused before any was taken"
            )
        self.stated = max(self.stated, self.bytes - self._left + count)
