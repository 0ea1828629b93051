"""A sandbox whose server dies."""

import psutil

from dist_lm.sandbox.sandbox import Sandbox
from tests.patience import patient


def kill_server(sandbox: Sandbox) -> None:
    """Kills the server of a sandbox that has run something, and waits until none of its processes is left.

    They end one after the other, and one that is still there could answer the next request.
    """
    assert sandbox._server
    server = sandbox._server._process
    below = psutil.Process(server.pid).children(recursive=True)
    server.kill()
    server.wait()
    _, left = psutil.wait_procs(below, timeout=patient(30))
    assert not left
