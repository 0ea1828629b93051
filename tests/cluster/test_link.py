"""A link between two nodes: measured for those who know the secret, refused to others."""

import socket

from dist_lm.cluster.node_facts import LinkServer, send


def test_a_link_is_measured_and_strangers_are_hung_up_on():
    server = LinkServer("127.0.0.3")
    rate = send("127.0.0.3", server.port, server.secret, (3 << 20) + 17)
    assert isinstance(rate, float)
    assert rate > 1e6
    refused = send("127.0.0.3", server.port, bytes(32), 1 << 20)
    assert isinstance(refused, str)
    assert "127.0.0.3" in refused
    server.close()
    assert "127.0.0.3" in str(send("127.0.0.3", server.port, server.secret, 1))


def test_somebody_who_says_nothing_does_not_hold_others_up():
    server = LinkServer("127.0.0.3")
    with socket.create_connection(("127.0.0.3", server.port)):
        assert isinstance(send("127.0.0.3", server.port, server.secret, 1), float)
    server.close()
