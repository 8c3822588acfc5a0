"""The demo from end to end, as `make demo` runs it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_classifies_the_test_digits_as_scikit_learn_does_and_ends() -> None:
    command = [sys.executable, "-m", "deploy.demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    facts = dict(re.findall(r"^(\S.*?)  +(\S.*)$", done.stdout, re.MULTILINE))
    assert facts["accuracy"] == "0.9844"
    assert facts["as scikit-learn says"] == "450 of 450"
    assert facts["server's exit code"] == "0"
    assert float(facts["requests/s"].replace(",", "")) > 0
    assert float(facts["mean batch"].removesuffix(" rows")) >= 1
    assert "server has stopped all_answered=True" in done.stderr
