"""Some trials of ``make chaos``, on the smallest command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import octavo

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import chaos
print(json.dumps(chaos.run(Path(sys.argv[2]), 4, 0, ("compress",))))
"""


def test_every_bad_day_ends_with_the_same_bytes_or_a_clear_refusal(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(octavo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CODE, str(BENCHMARKS), str(tmp_path / "chaos")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert sum(sum(count.values()) for count in result["counts"].values()) == 4
    assert all("failed" not in count for count in result["counts"].values())
