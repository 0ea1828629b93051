"""`python -m tests.cluster.served_run RUN`: a run is served until its neighbour has tried everything once.

The neighbour (`neighbour.py`) says so by a file in the temporary folder. The exit code is 0 if the server gave the same
answer before and after it, and ended at SIGTERM.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.cluster.neighbour import ROUND
from tests.patience import patient

BODY = {
    "prompt": "def add(",
    "max_tokens": 8,
    "temperature": 0,
    "return_token_ids": True,
    "constraint": {"regex": "[a-z ]{8,20}"},  # compiled in a process with limits, which is tried too
}


def main() -> None:
    run = sys.argv[1]
    command = [sys.executable, "-m", "dist_lm", "serve", run, "--port", "0", "--device", "cpu", "--follow"]
    # Without a key the server takes any; an empty one is no header.
    headers = {"Authorization": f"Bearer {os.environ['DIST_LM_API_KEY'] or 'none'}"}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout
            lines = [server.stdout.readline() for _ in range(2)]  # of memory, of the address
            url = lines[1].split()[1].rstrip(",")

            def answer() -> list[int]:
                response = httpx.post(f"{url}/completions", json=BODY, headers=headers, timeout=patient(60))
                response.raise_for_status()
                return response.json()["choices"][0]["token_ids"]

            first = answer()
            deadline = time.monotonic() + patient(120)
            while not (Path(tempfile.gettempdir()) / ROUND).exists():
                assert time.monotonic() < deadline, "the neighbour has not tried everything"
                time.sleep(0.1)

            assert answer() == first
            server.send_signal(signal.SIGTERM)
            assert server.wait(patient(60)) == 0
        finally:
            server.kill()


if __name__ == "__main__":
    main()
