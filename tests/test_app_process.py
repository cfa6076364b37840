"""`python -m eval.app` as a user starts and stops it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.scenes import pretrained

ROOT = Path(__file__).resolve().parent.parent


def test_the_command_serves_at_the_address_that_it_prints_until_ctrl_c(tmp_path: Path):
    run_dir = pretrained(tmp_path / "run", "simclr")
    words = [f"ckpt={run_dir}", "port=0", "device=cpu", "threads=1", "sample=48", "num_images=2"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "eval.app", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = []
        assert process.stdout is not None
        for line in process.stdout:  # which ends with the process, and the test, where it fails to serve
            said.append(line)
            if line.startswith("serving on"):
                break
        address = re.search(r"http://127\.0\.0\.1:\d+/", "".join(said))
        assert address is not None, "".join(said)
        with urllib.request.urlopen(address[0], timeout=60) as answer:
            assert answer.status == 200
            assert b"<title>" in answer.read()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert rest.splitlines()[-1] == "stopped"
    finally:
        process.kill()
        process.wait()
