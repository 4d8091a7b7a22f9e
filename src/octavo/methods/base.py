"""The base class of methods, and the registry that finds all of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods.words import spelled
from octavo.sources.sites import Site
from octavo.system.registry import Registry

#: One choice of a method's knobs as plain JSON: ``{"bits": 4, "group": 64}``.
Setting = dict[str, Any]

PRESETS = ("fast", "default", "best")
#: In place of a preset: only requests that name the method try it.
NAMED = "named"

M = TypeVar("M", bound="type[Method]")


class Method(ABC):
    """An algorithm that finds forms for a weight matrix; its dataclass fields are its knobs.

    A method only *finds* forms. The form decides how it is stored and run, and the allocator decides which setting is
    used.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    #: The cheapest preset that tries this method, or ``named``.
    preset: ClassVar[str] = "default"
    #: Name of a knob that changes the size continuously, so that a budget can be met exactly; None if there is none.
    elastic: ClassVar[str | None] = None
    #: The keys that a setting may have (others are refused); None if the method does not state them.
    takes: ClassVar[tuple[str, ...] | None] = None
    #: Whether every form restores the weight bit for bit. Such methods run first: settings with more bytes are not
    #: tried.
    lossless: ClassVar[bool] = False
    #: Whether its forms are the matrix itself in a floating dtype. Every family may fall back on such a method, and
    #: none competes with it.
    dense: ClassVar[bool] = False
    #: Whether it is what anybody would do first: a mixed plan must beat one setting of it for all sites. Such a method
    #: states :meth:`fineness`.
    plain: ClassVar[bool] = False
    #: Whether its forms are codes on a grid without bounds, which a source can teach.
    learns: ClassVar[bool] = False
    #: The targets that offer it, if its forms are the formats of other runtimes; all ordinary ones if there is none.
    runtimes: ClassVar[tuple[str, ...]] = ()
    #: Whether it is made for differences of a tuned weight to its base: elsewhere it is offered only where it is named.
    changes: ClassVar[bool] = False
    #: Words that a user may write for a method and a setting, such as ``float16``.
    words: ClassVar[Mapping[str, Setting]] = MappingProxyType({})
    #: Whether its :meth:`speed_settings` scale the inputs. Sites that read the same inputs then get the same setting.
    scales_inputs: ClassVar[bool] = False

    #: Whether each row is encoded independently of the others. Then a sample of rows represents a large matrix.
    #: A method that does not state this always gets the whole matrix.
    by_rows: ClassVar[bool] = False
    #: Whether it uses the curvature of the whole matrix. A sample has none, so the method is not screened on a sample.
    by_curvature: ClassVar[bool] = False

    def __str__(self) -> str:
        """The name with the knobs that differ from their defaults: ``entropy:rate=0.2``.

        Equal methods have equal words, others have different ones; :func:`octavo.methods.get_method` reads them back.
        """
        return spelled(self.name, self)

    def accepts(self, site: Site) -> bool:
        """Whether the method makes sense at this site; what finds structure between rows does not at a single row."""
        return site.kind != "vector" or self.by_rows or self.lossless

    def at_site(self, site: Site) -> Self:
        """The method with knobs adapted to a site that it accepts."""
        return self

    def octaves(self, setting: Setting) -> float:
        """The position of a setting's continuous knob; one octave more is about one bit per weight less."""
        return math.log2(setting[self.elastic or ""])

    def at(self, setting: Setting, octaves: float) -> Setting:
        """The setting with its continuous knob moved to ``octaves``, as a short decimal that survives YAML."""
        return {**setting, self.elastic or "": float(f"{2.0**octaves:.5g}")}

    def refuse_unknown(self, setting: Setting) -> None:
        """Raise :class:`RequestError` if a setting has a key that the method does not read."""
        known = setting if self.takes is None else self.takes
        for key in setting:
            if key not in known:
                raise RequestError(
                    f"{self.name}: {key!r} is not a setting of this method; choose from {', '.join(known)}"
                )

    @abstractmethod
    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The settings to try, from largest to smallest; empty if the method offers nothing here."""

    def kernel_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The settings whose forms a kernel can run from memory, largest first."""
        return []

    def speed_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The settings that are offered for a budget of time, in a graph whose matrix products take integers."""
        return []

    def fineness(self, setting: Setting) -> tuple[float, float]:
        """How fine a setting is: bits a weight, and then a number that is larger for the finer of two."""
        raise NotImplementedError(f"{self.name} does not say how fine its settings are")

    @abstractmethod
    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:
        """Encode ``weight`` (rows, columns), float32, as a form."""

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Encode several settings; methods that can share work between settings override this.

        ``settings`` may be lazy: the next setting is read after the last form was taken. An impossible setting may be
        skipped.
        """
        for setting in settings:
            yield self.encode(weight, setting, evidence)


METHODS = Registry[type[Method]]("method", "octavo.methods")


def method(name: str, *, family: str, source: str, preset: str = "default") -> Callable[[M], M]:
    """Register a method.

    Parameters
    ----------
    name
        The name that users write.
    family
        The family by which it is named and compared: ``quantize``, ``prune``, ``factorize``, ``keep``, or its own.
    source
        The publication of the algorithm.
    preset
        The cheapest preset that tries it: ``fast``, ``default`` or ``best``; or ``named``, if only requests that name
        it should wait for it.
    """

    def register(cls: M) -> M:
        if preset not in (*PRESETS, NAMED):
            raise ValueError(f"method {name!r} has the unknown preset {preset!r}; choose from {(*PRESETS, NAMED)}")
        METHODS.add(name, cls)
        cls.name, cls.family, cls.source, cls.preset = name, family, source, preset
        return cls

    return register
