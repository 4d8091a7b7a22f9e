"""The package's own file: public names that are imported when they are asked for."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import octavo

#: Generous, for a busy machine; either takes a few tenths of a second on a quiet one.
SECONDS = 5
CODE = """
import sys, time
began = time.process_time()
{act}
heavy = sorted({{"torch", "transformers", "numpy", "matplotlib"}} & set(sys.modules))
assert not heavy, heavy
assert time.process_time() - began < {seconds}, "slow"
"""


@pytest.mark.parametrize(
    "act",
    [
        "import octavo",
        "from octavo.cli import main\nsys.argv = ['octavo', '--help']\ntry: main()\nexcept SystemExit as end: assert not end.code",
    ],
    ids=["import octavo", "octavo --help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(act):
    subprocess.run([sys.executable, "-c", CODE.format(act=act, seconds=SECONDS)], check=True, stdout=subprocess.DEVNULL)


def test_every_public_name_is_there():
    found = {}
    exec("from octavo import *", found)
    assert set(octavo.__all__) <= set(found) and set(octavo.__all__) <= set(dir(octavo))
    assert octavo.compress is found["compress"] and callable(octavo.compress)
    assert octavo.__version__
    with pytest.raises(AttributeError, match="no attribute 'squeeze'"):
        _ = octavo.squeeze


@pytest.mark.parametrize("name", octavo.__all__)
def test_public_names_are_copied_and_pickled_as_themselves(name):
    value = getattr(octavo, name)
    assert copy.copy(value) is value and copy.deepcopy(value) is value
    assert pickle.loads(pickle.dumps(value)) is value


def test_errors_are_copied_and_pickled():
    error = pickle.loads(pickle.dumps(copy.copy(octavo.RequestError("model: is missing; name it"))))
    assert type(error) is octavo.RequestError and str(error) == "model: is missing; name it"


def test_no_module_bears_the_name_of_a_public_function():
    package = Path(octavo.__file__).parent
    modules = {part for file in package.rglob("*.py") for part in file.relative_to(package).with_suffix("").parts}
    functions = {name for name in octavo.__all__ if not isinstance(getattr(octavo, name), type)}
    assert not modules & functions
