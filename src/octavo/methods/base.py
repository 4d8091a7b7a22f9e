"""The base class of methods, and the registry that finds all of them."""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.sources.sites import Site

#: One choice of a method's knobs as plain JSON: ``{"bits": 4, "group": 64}``.
Setting = dict[str, Any]

PRESETS = ("fast", "default", "best")
#: The methods of `default`, without data.
DATA_FREE = "data-free"

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


class Method(ABC):
    """An algorithm that finds forms for a weight matrix; its dataclass fields are its knobs.

    A method only *finds* forms. The form decides how it is stored and run, and the allocator decides which setting is
    used.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    #: The cheapest preset that tries this method.
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
    #: Words that a user may write for a method and a setting, such as ``float16``.
    words: ClassVar[Mapping[str, Setting]] = MappingProxyType({})
    #: Whether its :meth:`speed_settings` scale the inputs. Sites that read the same inputs then get the same setting.
    scales_inputs: ClassVar[bool] = False

    #: Whether each row is encoded independently of the others, so that a sample of rows represents the whole matrix.
    by_rows: ClassVar[bool] = True
    #: Whether it uses the curvature of the whole matrix. A sample has none, so the method is not screened on a sample.
    by_curvature: ClassVar[bool] = False

    def accepts(self, site: Site) -> bool:
        """Whether the method makes sense at this site."""
        return True

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

    def offered(self, weight: Tensor, evidence: Evidence, target: str) -> list[Setting]:
        """The settings to try for a disk or memory budget."""
        return self.kernel_settings(weight, evidence) if target == "memory" else self.settings(weight, evidence)

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


def method(name: str, *, family: str, source: str, preset: str = "default") -> Callable[[M], M]:
    """Register a method.

    Parameters
    ----------
    name
        The name that users write.
    family
        ``quantize``, ``prune``, ``factorize``, ``structure`` or ``share``.
    source
        The publication of the algorithm.
    preset
        The cheapest preset that tries it: ``fast``, ``default`` or ``best``.
    """

    def register(cls: M) -> M:
        if name in _METHODS:
            raise ValueError(f"a method named {name!r} is already registered: {_METHODS[name].__qualname__}")
        if preset not in PRESETS:
            raise ValueError(f"method {name!r} has the unknown preset {preset!r}; choose from {PRESETS}")
        cls.name, cls.family, cls.source, cls.preset = name, family, source, preset
        _METHODS[name] = cls
        return cls

    return register


@cache
def _load_all() -> None:
    """Import every method file of this package and of the ``octavo.methods`` entry points; each registers itself."""
    import octavo.methods as package

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    for entry in entry_points(group="octavo.methods"):
        entry.load()


def methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    _load_all()
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The method with that name and default knobs."""
    _load_all()
    if name not in _METHODS:
        raise RequestError(f"method {name!r} is not known; choose from {', '.join(methods())}")
    return _METHODS[name]()


def dense_method() -> Method:
    """The method that keeps matrices as they are."""
    return next(cls() for cls in methods().values() if cls.dense)


def plain_method() -> Method:
    """The method of which one setting for all sites is what every plan must beat."""
    return next(cls() for cls in methods().values() if cls.plain)


def dense_names() -> frozenset[str]:
    """Names of the methods that keep matrices as they are."""
    return frozenset(name for name, cls in methods().items() if cls.dense)


def select_methods(names: Sequence[str] | None, preset: str, target: str = "disk") -> list[Method]:
    """The methods of a preset, or those named by method or family; for memory only those with a kernel."""
    if preset not in (*PRESETS, DATA_FREE):
        raise RequestError(f"preset {preset!r} is not known; choose from {', '.join((*PRESETS, DATA_FREE))}")
    known = methods()
    if target == "memory":
        # Few settings have a kernel, so every preset tries all of them.
        known = {name: cls for name, cls in known.items() if cls.kernel_settings is not Method.kernel_settings}
        preset = "default" if preset == "fast" else preset
    if names is None:
        allowed = PRESETS[: PRESETS.index("default" if preset == DATA_FREE else preset) + 1]
        return [cls() for cls in known.values() if cls.preset in allowed]
    if not names:
        raise RequestError("methods: the list is empty; name a method, or leave it out to use those of the preset")
    chosen: dict[str, Method] = {}
    for name in names:
        matches = [cls for cls in known.values() if name in (cls.name, cls.family)]
        if not matches:
            families = sorted({cls.family for cls in known.values()})
            if target == "memory" and name in {word for cls in methods().values() for word in (cls.name, cls.family)}:
                raise RequestError(
                    f"method {name!r} has no setting that runs from memory; choose from {', '.join(known)}"
                )
            raise RequestError(
                f"{name!r} is neither a method nor a family; choose from {', '.join(known)}, or from the families "
                f"{', '.join(families)}"
            )
        chosen.update((cls.name, cls()) for cls in matches)
    return list(chosen.values())
