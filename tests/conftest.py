"""One short real run, shared by every test that looks at what a run leaves behind."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def cli(*arguments, script="shielddiff.py", timeout=900):
    """The real command line, as a user types it."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=timeout)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of 10 steps on the embedded model, all other flags at their defaults."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    done = cli("--model", "tests/tiny", "--steps", 10, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="session")
def pipe():
    from shielddiff import load_pipeline
    return load_pipeline(str(ROOT / "tests/tiny"))
