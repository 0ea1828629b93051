"""Ports of this machine."""

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from dist_lm.storage import process


def test_a_reserved_port_is_free_for_a_store_and_for_nobody_by_chance() -> None:
    with process.reserve_port() as reserved:
        port = reserved.getsockname()[1]
        for address in "127.0.0.2", "127.0.0.3":
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((address, port))
        store = TCPStore("127.0.0.2", port, 1, True, timedelta(seconds=5), multi_tenant=True)
        store.set("key", "value")
        assert TCPStore("127.0.0.2", port, 1, False, timedelta(seconds=5)).get("key") == b"value"
