"""References to objects that a program was never given are refused, and the judge goes on."""

import socket
from typing import Any

import pytest

from dist_lm.sandbox.calls import END, QUESTION, READY, REFUSED, VALUE, Peer
from dist_lm.sandbox.values import Encoder, Reference


def frame(kind: int, content: bytes) -> bytes:
    return (1 + len(content)).to_bytes(4, "big") + bytes([kind]) + content


def question(number: int) -> bytes:
    """Asks for the kind of the judge's object of this number."""
    encoder = Encoder(lambda _: Reference(number, False))
    encoder.put(("kind", object()))
    return frame(QUESTION, encoder.finished())


def kinds_of_frames(content: bytes) -> list[int]:
    kinds = []
    while content:
        length = int.from_bytes(content[:4], "big")
        kinds.append(content[4])
        content = content[4 + length :]
    return kinds


@pytest.mark.parametrize("names", [{}, {"f": lambda: 1}, {"f": lambda: 1, "g": lambda: 2}])
def test_the_first_number_that_no_object_has_is_refused(names: dict[str, Any]) -> None:
    """Finds a judge that ends at a reference just behind its last object."""
    judge_end, program_end = socket.socketpair()
    with judge_end, program_end:
        peer = Peer(judge_end.fileno(), {"kind": lambda value: type(value).__name__})
        numbers = range(len(names) + 1)
        program_end.sendall(b"".join(map(question, numbers)) + frame(END, b""))
        assert peer.serve(names)
        kinds = kinds_of_frames(program_end.recv(1 << 16))
    assert kinds == [READY, *[VALUE] * len(names), REFUSED]
