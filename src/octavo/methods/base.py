"""What a method is, the registry that finds all of them, and which of them a request takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.sources.sites import Site
from octavo.system.registry import Registry

#: One choice of a method's knobs, plain JSON: ``{"bits": 4, "group": 64}``.
Setting = dict[str, Any]

PRESETS = ("fast", "default", "best")

M = TypeVar("M", bound="type[Method]")


class Method(ABC):
    """An algorithm that finds forms for a weight matrix; its dataclass fields are its knobs.

    A method only *finds*. How a form is stored and run is the form's business, which setting is taken is the
    allocator's.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    #: The cheapest preset that tries this method.
    preset: ClassVar[str] = "default"
    #: Name of a knob that changes the size continuously, so that a budget can be met exactly; None if there is none.
    elastic: ClassVar[str | None] = None
    #: The keys that a setting may have, others being refused; None where a method does not say.
    takes: ClassVar[tuple[str, ...] | None] = None
    #: Whether every form it finds restores the weight bit for bit. Such methods go first: what takes more bytes than
    #: theirs is not tried.
    lossless: ClassVar[bool] = False

    #: Whether every row is encoded alike, whichever other rows there are. Then a large matrix is judged by a sample of
    #: its rows. A method that does not say so is always given the whole matrix.
    by_rows: ClassVar[bool] = False
    #: Whether it works from the curvature of the whole matrix, which no sample has: it is not tried on one first.
    by_curvature: ClassVar[bool] = False

    def accepts(self, site: Site) -> bool:
        """Whether the method makes sense at this site."""
        return True

    def at_site(self, site: Site) -> Self:
        """The method with knobs that are fit for a site that it accepts."""
        return self

    def octaves(self, setting: Setting) -> float:
        """Where a setting's continuous knob stands; one octave more is about one bit a weight less."""
        return math.log2(setting[self.elastic or ""])

    def at(self, setting: Setting, octaves: float) -> Setting:
        """The setting with its continuous knob moved to ``octaves``, as a short decimal that survives YAML."""
        return {**setting, self.elastic or "": float(f"{2.0**octaves:.5g}")}

    def refuse_unknown(self, setting: Setting) -> None:
        """Raise :class:`RequestError` if a setting has a key that the method does not read."""
        known = setting if self.takes is None else self.takes
        for key in setting:
            if key not in known:
                raise RequestError(f"{self.name}: {key!r} is no setting of this method; it takes {', '.join(known)}")

    @abstractmethod
    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The settings worth trying, from largest to smallest; none if the method has nothing to offer here."""

    def kernel_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The settings whose forms run from memory as they are, with a kernel, largest first."""
        return []

    def offered(self, weight: Tensor, evidence: Evidence, target: str) -> list[Setting]:
        """The settings worth trying for a budget of disk or memory."""
        return self.kernel_settings(weight, evidence) if target == "memory" else self.settings(weight, evidence)

    @abstractmethod
    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:
        """A form of ``weight`` (rows, columns), float32."""

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Forms of several settings; methods that can share work between settings override this.

        ``settings`` may be lazy: the next one is asked for only after the form of the last was taken. A setting that
        turns out to be impossible may be passed over.
        """
        for setting in settings:
            yield self.encode(weight, setting, evidence)


METHODS = Registry[type[Method]]("method", "octavo.methods")


def method(name: str, *, family: str, source: str, preset: str = "default") -> Callable[[M], M]:
    """Register a method.

    Parameters
    ----------
    name
        The name users write.
    family
        ``quantize``, ``prune``, ``factorize`` or ``share``.
    source
        Where the algorithm was published.
    preset
        The cheapest preset that tries it: ``fast``, ``default`` or ``best``.
    """

    def register(cls: M) -> M:
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} of method {name!r} is none of {PRESETS}")
        METHODS.add(name, cls)
        cls.name, cls.family, cls.source, cls.preset = name, family, source, preset
        return cls

    return register
