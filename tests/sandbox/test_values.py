"""Values arrive as what they are, subclasses as their base, and hostile bytes as an error within the limits."""

import collections
import datetime
import decimal
import enum
import fractions
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.sandbox.values import (
    MAX_BYTES,
    MAX_DEPTH,
    Decoder,
    Encoder,
    MalformedError,
    NotCarriedError,
    Raised,
    write_back,
)

Point = collections.namedtuple("Point", "x y")


def carried(value: Any) -> Any:
    encoder = Encoder()
    encoder.put(value)
    decoder = Decoder(encoder.finished())
    result = decoder.take()
    decoder.end()
    return result


texts = st.text(st.characters(codec=None, exclude_categories=()))
zones = st.none() | st.integers(-1439, 1439).map(lambda m: datetime.timezone(datetime.timedelta(minutes=m)))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**200), 10**200),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    texts,
    st.binary(),
    st.decimals(allow_nan=False),
    st.fractions(),
    st.dates(),
    st.times(timezones=zones),
    st.datetimes(timezones=zones),
    st.timedeltas(),
    st.sampled_from([int, len, ValueError, range(5), range(9, 2, -3)]),
)
hashable = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    hashable | st.binary().map(bytearray),
    lambda inner: st.one_of(
        st.lists(inner, max_size=40),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(collections.deque),
        st.sets(hashable, max_size=3),
        st.dictionaries(hashable, inner, max_size=3),
        st.dictionaries(hashable, st.integers(), max_size=3).map(collections.Counter),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
    ),
    max_leaves=20,
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of the same types at every depth."""
    if isinstance(one, tuple) and hasattr(one, "_fields"):
        return one._fields == other._fields and same(tuple(one), tuple(other))
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple | collections.deque):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(same, one.items(), other.items()))
    if isinstance(one, float | complex):
        return repr(one) == repr(other)  # also the sign of zero
    return one == other


@pytest.mark.heavy
@given(values)
def test_a_value_arrives_as_it_is(value):
    assert same(value, carried(value))


@pytest.mark.parametrize("many", [[*range(100)], [1.5] * 100, [2**63] * 20, [True] * 20, [1, 2.0] * 10, {*range(50)}])
def test_many_numbers_arrive_as_they_are(many):
    assert same(carried(many), many)


def test_nan_views_and_names_of_fields_arrive():
    assert math.isnan(carried(float("nan")))
    assert carried({1: 2}.keys()) == {1}
    assert [*carried({1: 2}.values())] == [2]
    assert carried({1: 2}.items()) == {(1, 2)}
    point = carried(Point(1, [2]))
    assert (point.x, point.y, repr(point), point._asdict()) == (1, [2], "Point(x=1, y=[2])", {"x": 1, "y": [2]})
    assert carried(collections.deque([1, 2], maxlen=2)).maxlen == 2


class Level(enum.IntEnum):
    HIGH = 3


class Liar(int):
    def __eq__(self, other):
        return True

    def __int__(self):
        return 9

    def bit_length(self):
        return 9

    __hash__ = int.__hash__


class LyingList(list):
    def __iter__(self):
        return iter([9])

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return 9


class LyingText(str):
    def encode(self, *_):
        return b"lie"

    __str__ = encode


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Level.HIGH, 3),
        (Liar(1), 1),
        (LyingList([1, 2]), [1, 2]),
        (LyingText("truth"), "truth"),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(int, {1: 2}), {1: 2}),
        (type("D", (dict,), {"items": lambda self: []})({1: 2}), {1: 2}),
        (type("S", (set,), {"__iter__": lambda self: iter([])})({1}), {1}),
        (type("F", (float,), {"__float__": lambda self: 9.0})(1.5), 1.5),
    ],
)
def test_a_subclass_arrives_as_its_base_value(value, base):
    result = carried(value)
    assert type(result) is type(base)
    assert result == base


def test_identity_is_kept_within_a_frame():
    row = [0]
    loop: list = [row, row]
    loop.append(loop)
    result = carried(loop)
    assert result[0] is result[1]
    assert result[2] is result


def test_an_exception_travels_by_names_and_arguments():
    raised = carried(KeyError("a", 1))
    assert isinstance(raised, Raised)
    assert raised.names == ("KeyError", "LookupError", "Exception")
    assert raised.arguments == ("a", 1)
    assert carried(ValueError(object())).arguments is None


@pytest.mark.parametrize("value", [object(), lambda: 0, Point, open, enum, iter([1]), {1: object()}])
def test_other_objects_are_named(value):
    with pytest.raises(NotCarriedError, match=r"of type (object|function|type|builtin|module|list_iterator)"):
        carried(value)


@pytest.mark.heavy
def test_depth_and_size_are_limited():
    deep: list = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    for value in (deep, "x" * MAX_BYTES, [None] * MAX_BYTES, (tuple([()] * 2_000),) * 2_000):
        with pytest.raises(NotCarriedError, match="more than"):
            carried(value)


def decoded(data: bytes) -> Any:
    """The value in hostile bytes; only MalformedError may be raised."""
    try:
        return Decoder(data).take()
    except MalformedError:
        return None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_malformed(data):
    decoded(data)


@pytest.mark.heavy
@given(values, st.data())
def test_changed_bytes_are_a_value_or_malformed(value, data):
    encoder = Encoder()
    encoder.put(value)
    content = bytearray(encoder.finished())
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(content) - 1))
        content[index] = data.draw(st.integers(0, 255))
    decoded(bytes(content))
    decoded(bytes(content[: data.draw(st.integers(0, len(content)))]))


@pytest.mark.parametrize(
    "data",
    [
        b"l\xff\xff\xff\xff\x0f*",  # more items than bytes
        b"i\xff\xff\xff\xff\xff\xff\x01",  # a length of more than 35 bits
        b"l\x01*" * (MAX_DEPTH + 2) + b"N",
        b"R\x05",
        b"d\x01*N",
        b"d\x02*l\x00*N",  # a list as a key
        b"q" + b"i\x01\xff" + b"l\x00*",  # maxlen -1
        b"D\x01\x03abc",
        b"Q\x02*i\x01\x01i\x01\x00",  # a denominator of zero
        b"B\x01\x04eval",
        b"B\x01\x0a__import__",
        b"n\x02\x01P\x06__eq__t\x01*N",
        b"n\x03\x01P\x01x\x01xt\x02*NN",
        b"M\x09*" + b"i\x01\x01" * 7 + b"i\x01\x00N",  # year 1 is one; the next is month 13
        b"a\x03*i\x01\x01i\x01\x0di\x01\x01",
        b"h\x00f\x01\x01f",
        b"p\x00",
        b"E\x00\x01N",
        b"z",
        b"",
    ],
)
def test_malformed_bytes_are_refused(data):
    if data.startswith(b"M"):
        assert Decoder(data).take() == datetime.datetime(1, 1, 1, 1, 1, 1, 1)
        return
    with pytest.raises(MalformedError):
        Decoder(data).take()


@pytest.mark.parametrize(
    ("container", "contents"),
    [
        ([1], [2, 3]),
        ({1}, {2}),
        ({1: 2}, {3: 4}),
        (bytearray(b"a"), bytearray(b"bc")),
        (collections.deque([1]), collections.deque([2])),
        (collections.Counter("a"), collections.Counter("bb")),
    ],
)
def test_contents_are_written_in_place(container, contents):
    write_back(container, contents)
    assert container == contents
    with pytest.raises(MalformedError):
        write_back(container, (1,))


def test_every_carried_type_of_numbers_has_its_sign():
    for value in (decimal.Decimal("-0"), fractions.Fraction(-1, 3), -0.0, complex(-0.0, 0.0)):
        assert repr(carried(value)) == repr(value)
