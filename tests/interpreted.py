"""Triton's kernels without a GPU: its interpreter runs them on the CPU, in a process of its own, because it is chosen
before Triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def interpreted(file: str) -> dict[str, float]:
    """What a test's file prints last when it is run as a script with the interpreter: a JSON object."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
