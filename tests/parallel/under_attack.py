"""`python -m tests.parallel.under_attack FOLDER GUARDED`: two ranks meet while another user connects to their ports.

Runs in a network of its own, because the other user connects to every port that appears. Prints a JSON list with what
each rank computed in each group (3.0 if no stranger took part), or the error that it met.
"""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_lm.parallel.guarded_gloo import guarded

RANKS, GROUPS = 2, 10
# Connects to every new port of user 0 on the loopback interface, as the first three pairs of a gloo device.
NEIGHBOUR = """
import os, socket, struct
os.setgroups([]); os.setgid(65534); os.setuid(65534)
known, held = set(), []
print("ready", flush=True)
while True:
    for line in open("/proc/net/tcp").read().splitlines()[1:]:
        words = line.split()
        if words[3] != "0A" or words[7] != "0" or words[1] in known:
            continue
        known.add(words[1])
        for pair in range(3):
            connection = socket.socket()
            connection.setblocking(False)
            try:
                connection.connect(("127.0.0.1", int(words[1][9:], 16)))
            except BlockingIOError:
                pass
            try:
                connection.send(struct.pack("q", pair) + b"\\1" * 64)
            except OSError:
                pass
            held = held[-300:] + [connection]
"""


def rank(number: int, store: str, is_guarded: bool, results: "multiprocessing.SimpleQueue[str | float]") -> None:
    for group in range(GROUPS):
        try:
            with guarded() if is_guarded else nullcontext():
                dist.init_process_group(
                    "gloo",
                    store=dist.PrefixStore(str(group), dist.FileStore(store)),
                    rank=number,
                    world_size=RANKS,
                    timeout=timedelta(seconds=60 if is_guarded else 2),
                )
            total = torch.tensor([number + 1.0])
            dist.all_reduce(total)
            results.put(float(total))
            dist.barrier()
            dist.destroy_process_group()
        except RuntimeError as error:
            results.put(str(error)[:200])
            break
    os._exit(0)


def main() -> None:
    folder, is_guarded = sys.argv[1], bool(int(sys.argv[2]))
    logging.basicConfig(level=logging.WARNING)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    neighbour = subprocess.Popen([sys.executable, "-S", "-c", NEIGHBOUR], stdout=subprocess.PIPE)
    assert neighbour.stdout
    neighbour.stdout.readline()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=rank, args=(number, f"{folder}/store", is_guarded, results)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found = []
    while not results.empty():
        found.append(results.get())
    assert neighbour.poll() is None
    neighbour.kill()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
