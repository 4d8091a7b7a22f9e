"""Integers and byte blocks of variable length, as stored in the head of a blob."""

from octavo.errors import ArtifactError


class Writer:
    """Collects the variable part of a head."""

    def __init__(self) -> None:
        self.data = bytearray()

    def unsigned(self, value: int) -> None:
        """Append a LEB128 integer: seven bits a byte, least significant first."""
        while value > 127:
            self.data.append(value & 127 | 128)
            value >>= 7
        self.data.append(value)

    def signed(self, value: int) -> None:
        """Append an integer whose sign is folded into the lowest bit."""
        self.unsigned(value << 1 if value >= 0 else ~value << 1 | 1)

    def block(self, data: bytes) -> None:
        """Append bytes after their length."""
        self.unsigned(len(data))
        self.data += data


class Reader:
    """Reads what `Writer` wrote, never past the end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes."""
        if count > len(self.data):
            raise ArtifactError(f"coded tensor: the head is {count - len(self.data)} bytes too short")
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def unsigned(self) -> int:
        """Return a LEB128 integer of at most 70 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ArtifactError("coded tensor: an integer in the head is longer than ten bytes")

    def signed(self) -> int:
        """Return an integer whose sign is folded into the lowest bit."""
        value = self.unsigned()
        return ~(value >> 1) if value & 1 else value >> 1

    def block(self) -> memoryview:
        """Return bytes stored after their length."""
        return self.take(self.unsigned())
