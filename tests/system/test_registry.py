"""The registry of parts: by decorator, by folder, from other packages."""

import sys
import threading
import warnings

import pytest

from octavo.errors import RequestError
from octavo.system.notes import OctavoWarning
from octavo.system.registry import Registry

HEAD = "from octavo.system.registry import Registry\nparts = Registry[type]('part', '{package}')\n"
PART = "from {package} import parts\n\n\n@parts.register('{name}')\nclass Part:\n    '''A part.'''\n"


@pytest.fixture
def house(tmp_path, monkeypatch, request):
    """Makes a package with parts, and returns its registry."""
    package = f"house_{request.node.name.translate(str.maketrans('[]-', '___'))}"
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(files: dict[str, str]) -> Registry[type]:
        folder = tmp_path / package
        for name, text in {"__init__.py": HEAD, **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.replace("{package}", package))
        return __import__(package).parts

    yield build
    for name in [name for name in sys.modules if name.partition(".")[0].startswith(package)]:
        del sys.modules[name]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a package that brings parts by entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(entries: dict[str, str], files: dict[str, str]) -> None:
        info = tmp_path / "stranger-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[octavo.parts]", *lines, ""]))
        for name, text in files.items():
            (tmp_path / name).write_text(text)

    return install


def part(name: str) -> str:
    return PART.replace("{name}", name)


def test_files_are_imported_at_the_first_lookup_and_register_themselves(house):
    parts = house({"b.py": part("b"), "inner/__init__.py": "", "inner/a.py": part("a")})
    assert f"{parts.package}.b" not in sys.modules
    assert parts.names() == list(parts.all()) == ["a", "b"]
    assert parts.get("a").__module__ == f"{parts.package}.inner.a" and "b" in parts and "c" not in parts


def test_a_registered_name_is_found_without_importing_the_others(house):
    parts = house({"b.py": part("b")})
    parts.add("mine", int)
    assert parts.get("mine") is int and f"{parts.package}.b" not in sys.modules


def test_unknown_names_are_refused_with_the_closest():
    parts = Registry[type]("part", "octavo.coding")
    parts.add("entropy", int)
    parts.add("alds", str)
    with pytest.raises(
        RequestError, match=r"^part 'entropi' is not known; did you mean 'entropy'\? choose from alds, "
    ):
        parts.get("entropi")
    with pytest.raises(RequestError, match=r"part 'zzz' is not known; choose from alds, entropy$"):
        parts.get("zzz")
    with pytest.raises(RequestError, match="choose from none"):
        Registry[type]("part", "octavo.coding").get("a")


def test_duplicates_are_refused_and_the_first_stays():
    parts = Registry[type]("part", "octavo.coding")
    parts.add("a", int)
    with pytest.raises(ValueError, match=r"part 'a' is already registered by builtins\.int; choose another name"):
        parts.register("a")(str)
    assert parts.get("a") is int


@pytest.mark.parametrize("name", ["", "A", "a b", "a,b", "a:b", "a=b", "-a", "a--b", "*"])
def test_names_that_no_command_line_can_tell_apart_are_refused(name):
    with pytest.raises(ValueError, match="use small letters"):
        Registry[type]("part", "octavo.coding").add(name, int)


def test_parts_of_other_packages_are_found(house, installed):
    parts = house({"own.py": part("own")})
    installed({"theirs": "stranger_a"}, {"stranger_a.py": part("theirs").replace("{package}", parts.package)})
    assert parts.names() == ["own", "theirs"]


BROKEN = {
    "fails": ("raise RuntimeError('no \\x1b[31m luck')", r"RuntimeError: no \\x1b\[31m luck"),
    "leaves": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "absent": ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
    "twice": (part("own"), "'own' is already registered"),
    "half": (part("half") + "\nraise ValueError('late')\n", "ValueError: late"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_package_is_told_once_and_hides_no_other(house, installed, how):
    parts = house({"own.py": part("own")})
    text, told = BROKEN[how]
    files = {f"bad_{how}.py": text, f"good_{how}.py": part("good")}
    installed(
        {"bad": f"bad_{how}", "good": f"good_{how}"},
        {name: text.replace("{package}", parts.package) for name, text in files.items()},
    )
    with pytest.warns(OctavoWarning, match=rf"octavo.parts: 'bad' \(bad_{how}\) cannot be loaded .*{told}") as found:
        assert parts.names() == ["good", "own"]
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parts.get("own").__module__ == f"{parts.package}.own"
        with pytest.raises(RequestError, match=f"choose from good, own .not loaded: .*{told}"):
            parts.get("bad")


def test_a_broken_file_of_its_own_folder_fails_each_lookup(house):
    parts = house({"a.py": part("a"), "b.py": part("b") + "\nraise ValueError('late')\n"})
    for _ in range(2):
        with pytest.raises(ValueError, match="late"):
            parts.names()


def test_a_module_may_look_up_while_it_is_imported(house):
    parts = house({"a.py": part("a"), "b.py": "from {package} import parts\nfound = parts.names()\n"})
    assert parts.names() == ["a"] and sys.modules[f"{parts.package}.b"].found == ["a"]


def test_threads_see_all_or_wait(house):
    parts = house({f"p{index}.py": "import time\ntime.sleep(0.02)\n" + part(f"p{index}") for index in range(4)})
    seen: list[list[str]] = []
    threads = [threading.Thread(target=lambda: seen.append(parts.names())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["p0", "p1", "p2", "p3"]] * 4


def test_what_is_registered_for_a_while_is_forgotten():
    parts = Registry[type]("part", "octavo.coding")
    parts.add("a", int)
    with parts.temporary():
        parts.add("b", str)
        assert parts.names() == ["a", "b"]
    assert parts.names() == ["a"]
