"""The format in which judge and program exchange values: a tag of one byte for each value, then its content.

Values arrive as what they are: None, bool, int of any size, float, complex, str (lone surrogates too), bytes,
bytearray, list, tuple, named tuple, set, frozenset, dict, views of a dict, deque, Counter, range, Decimal, Fraction,
date, time, datetime, timedelta, exceptions and built-in types. A subclass arrives as its base value, read with the
base's methods: defaultdict and OrderedDict as dict, members of an IntEnum as int. Other objects travel as references
(`Reference`), which the two sides give a meaning.

Containers that can change keep their identity within a frame: one that occurs twice, or in itself, is the same object
on the other side.

Decoding treats its input as hostile. It imports and executes nothing, checks every length against the bytes that are
left, and builds nothing but exact built-in types. What it builds is limited by `MAX_BYTES`, `MAX_DEPTH` and
`MAX_VALUES`; the time of operations on it, as of equal hashes, by the limits of the process.

This module runs inside the sandbox. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

import builtins
import struct
import sys

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

MAX_BYTES = 4 << 20
MAX_DEPTH = 64
MAX_VALUES = 1 << 20
MAX_DIGITS = 100_000  # digits of a Decimal, and bytes of a name

MANY = 16  # from this number on, numbers are packed: one by one, each takes several microseconds

_double = struct.Struct(">d")
_PACKED = {b"q": int, b"d": float}  # code of `struct` -> type


class NotCarriedError(Exception):
    """Raised for a value that cannot travel; says which type or which limit it is."""


class MalformedError(Exception):
    """Raised for bytes that no encoder makes."""


class Reference:
    """An object that stays on the side that made it.

    Attributes:
        number: its place in the table of that side.
        is_own: whether the side that sends it made it; else it goes back to its maker.
        kind: one of the letters in `KINDS`.
        names: name of its type; of an exception class: its own name and those of its bases.
    """

    __slots__ = ("is_own", "kind", "names", "number")

    def __init__(self, number: int, is_own: bool, kind: str = "o", names: Sequence[str] = ()) -> None:
        self.number = number
        self.is_own = is_own
        self.kind = kind
        self.names = tuple(names)


KINDS = "ofiwxm"
"""Object, callable, iterator, awaitable, exception class, module."""


class Raised:
    """An exception as it travels.

    Attributes:
        names: its class and the bases of that, up to Exception.
        text: what `str` says of it.
        arguments: its arguments, if all of them are values.
    """

    __slots__ = ("arguments", "names", "text")

    def __init__(self, names: Sequence[str], text: str, arguments: Sequence[Any] | None) -> None:
        self.names = tuple(names)
        self.text = text
        self.arguments = arguments


BUILT_IN = {
    name: getattr(builtins, name)
    for name in (
        *("abs", "all", "any", "bin", "bool", "bytearray", "bytes", "chr", "complex", "dict", "divmod", "enumerate"),
        *("filter", "float", "frozenset", "hash", "hex", "int", "iter", "len", "list", "map", "max", "min", "next"),
        *("object", "oct", "ord", "pow", "range", "repr", "reversed", "round", "set", "slice", "sorted", "str", "sum"),
        *("tuple", "type", "zip", "NotImplemented", "Ellipsis"),
    )
}
"""Types and functions of the language that travel by their name."""
EXCEPTIONS = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, Exception) and name == value.__name__
}
"""Built-in exceptions by name, which travel like the other built-in types."""
_NAME_OF = {id(value): name for name, value in (BUILT_IN | EXCEPTIONS).items()}
_EMPTY_VIEWS = {"k": type({}.keys()), "v": type({}.values()), "x": type({}.items())}


class Encoder:
    """Writes values one after the other into `data`.

    Args:
        refer: returns the reference of an object that is no value; raises NotCarriedError if it can have none.
        shared: containers that the other side has too, in its order: they travel as their number.
    """

    def __init__(self, refer: Callable[[Any], Reference] | None = None, shared: Iterable[Any] = ()) -> None:
        self.data = bytearray()
        self.shared = [*shared]
        self._index_of = {id(container): index for index, container in enumerate(self.shared)}
        self._refer = refer
        self._num_values = 0

    def put(self, value: Any, depth: int = 0) -> None:
        """Writes a value; a reference in place of an object that is none.

        After an error a part of it is written.

        Args:
            depth: how many containers it stands in.

        Raises:
            NotCarriedError: names the type or the limit.
        """
        self._num_values += 1
        if depth > MAX_DEPTH:
            raise NotCarriedError(f"a value nested more than {MAX_DEPTH} deep")
        if self._num_values > MAX_VALUES or len(self.data) > MAX_BYTES:
            raise NotCarriedError(f"more than {MAX_VALUES} values or {MAX_BYTES} bytes")

        # Only built-in types and functions have names; those of the program are objects.
        write = _WRITERS.get(type(value)) or self._writer_of_base(type(value))
        if write is not None and not (write in _BY_NAME and id(value) not in _NAME_OF):
            write(self, value, depth)
        else:
            self._put_object(value)

    def put_contents(self, container: Any) -> None:
        """Writes a changeable container with its contents, although the other side has it."""
        self.shared.append(None)  # the other side makes a container of them, and gives it a number
        _CONTENTS[_base_of(type(container), _CONTENTS)](self, container, 0)  # type: ignore[index]

    def put_count(self, count: int) -> None:
        """Writes a whole number that is not negative: seven bits a byte, the lowest first."""
        data = self.data
        while count > 0x7F:
            data.append(count & 0x7F | 0x80)
            count >>= 7
        data.append(count)

    def finished(self) -> bytes:
        """Returns all that was written.

        Raises:
            NotCarriedError: it is too long for a frame.
        """
        if len(self.data) > MAX_BYTES:
            raise NotCarriedError(f"more than {MAX_BYTES} bytes")
        return bytes(self.data)

    def _writer_of_base(self, kind: type) -> Any:
        _know_loaded_modules()
        base = _base_of(kind, _WRITERS)
        if base is None or base is type:  # a class of the program is no value
            return _put_exception if BaseException in type.mro(kind) else None
        return _WRITERS[base]

    def _put_object(self, value: Any) -> None:
        """Writes a reference, or the name of a built-in type or function.

        Raises:
            NotCarriedError: the object can have no reference.
        """
        if id(value) in _NAME_OF:
            _put_name(self, value, 0)
            return
        if self._refer is None:
            raise NotCarriedError(f"a value of type {type(value).__name__}")
        reference = self._refer(value)
        if not reference.is_own:
            self.data += b"p"
            self.put_count(reference.number)
            return
        self.data += b"h"
        self.put_count(reference.number)
        self.data += reference.kind.encode()
        self._put_texts(reference.names)

    def _put_texts(self, texts: Sequence[str]) -> None:
        self.put_count(len(texts))
        for text in texts:
            self._put_bytes(str.encode(text, "utf-8", "surrogatepass")[:MAX_DIGITS])

    def _put_bytes(self, content: bytes) -> None:
        self.put_count(len(content))
        self.data += content

    def _is_shared(self, container: Any) -> bool:
        """Returns whether the other side has a container, and writes its number then; else gives it the next number."""
        index = self._index_of.get(id(container))
        if index is not None:
            self.data += b"R"
            self.put_count(index)
            return True
        self._index_of[id(container)] = len(self.shared)
        self.shared.append(container)
        return False

    def _put_all(self, tag: bytes, values: Sequence[Any], depth: int) -> None:
        """Writes a tag, the number of values and the values: whole numbers of 64 bits, or floats, all at once if there
        are MANY; others one by one.

        Raises:
            NotCarriedError: as `put`.
        """
        self.data += tag
        self.put_count(len(values))
        if len(values) >= MANY:
            for code, kind in _PACKED.items():
                if {*map(type, values)} == {kind} and (content := _packed(code, values)):
                    self._num_values += len(values)
                    self.data += code + content
                    return

        self.data += b"*"
        for value in values:
            self.put(value, depth + 1)


def _base_of(kind: type, table: Any) -> type | None:
    """Returns the first class among `kind` and its bases that `table` has."""
    for base in type.mro(kind):
        if base in table:
            return base
    return None


def _packed(code: bytes, values: Sequence[Any]) -> bytes:
    """Returns numbers as bytes of the same length; none if one of them does not fit."""
    try:
        return struct.pack(f">{len(values)}{code.decode()}", *values)
    except struct.error:
        return b""


def _put_int(encoder: Encoder, value: int, _: int) -> None:
    # One bit more than the digits need, for the sign.
    content = int.to_bytes(value, int.bit_length(value) // 8 + 1, "big", signed=True)
    encoder.data += b"i"
    encoder._put_bytes(content)


def _put_str(encoder: Encoder, value: str, _: int) -> None:
    encoder.data += b"s"
    encoder._put_bytes(str.encode(value, "utf-8", "surrogatepass"))


def _put_complex(encoder: Encoder, value: complex, _: int) -> None:
    # Getters of the base type, here and below: those of a subclass are code of the program.
    real, imaginary = (complex.__dict__[name].__get__(value) for name in ("real", "imag"))
    encoder.data += b"c" + _double.pack(real) + _double.pack(imaginary)


def _put_constant(encoder: Encoder, value: Any, _: int) -> None:
    encoder.data += b"N" if value is None else b"T" if value else b"F"


def _put_float(encoder: Encoder, value: float, _: int) -> None:
    encoder.data += b"f" + _double.pack(value)


def _put_bytes(encoder: Encoder, value: bytes, _: int) -> None:
    encoder.data += b"b"
    encoder._put_bytes(bytes.__getitem__(value, slice(None)))


def _put_tuple(encoder: Encoder, value: tuple, depth: int) -> None:
    """Writes a tuple; one with names for its fields is written with the name of its class and these.

    Raises:
        NotCarriedError: as `Encoder.put`.
    """
    items = tuple.__getitem__(value, slice(None))

    # Read past the metaclass, whose methods are code of the program, too.
    fields = None if type(value) is tuple else type.__dict__["__dict__"].__get__(type(value)).get("_fields")
    if type(fields) is tuple and len(fields) == len(items) and all(type(field) is str for field in fields):
        encoder.data += b"n"
        encoder._put_texts((type(value).__name__, *fields))
    encoder._put_all(b"t", items, depth)


def _put_frozenset(encoder: Encoder, value: frozenset, depth: int) -> None:
    encoder._put_all(b"Z", [*frozenset.__iter__(value)], depth)


def _put_range(encoder: Encoder, value: range, depth: int) -> None:
    encoder._put_all(b"r", (value.start, value.stop, value.step), depth)


def _put_view(tag: bytes) -> Callable[[Encoder, Any, int], None]:
    return lambda encoder, value, depth: encoder._put_all(tag, [*value], depth)


def _put_name(encoder: Encoder, value: Any, _: int) -> None:
    encoder.data += b"B"
    encoder._put_texts((_NAME_OF[id(value)],))


def _put_exception(encoder: Encoder, value: BaseException, depth: int) -> None:
    """Writes an exception: its text, the names of its classes, and its arguments if they are values. Calls its
    `__str__`, whose errors become the text."""
    names = exception_names(type(value))
    # An encoder of its own: arguments that are no values leave nothing half written.
    arguments = Encoder()
    try:
        arguments.put(BaseException.__dict__["args"].__get__(value), depth + 1)
        content = bytes(arguments.data)
    except NotCarriedError:
        content = b"N"
    try:
        text = str.__getitem__(str(value), slice(None))
    except Exception as error:
        text = f"its text raises {type(error).__name__}"
    encoder.data += b"E"
    encoder._put_texts((text, *names))
    encoder._put_bytes(content)


def exception_names(kind: type) -> list[str]:
    """Returns the name of an exception class and those of its bases."""
    return [base.__name__ for base in type.mro(kind) if base is not object and base is not BaseException]


def _put_list(encoder: Encoder, value: list, depth: int) -> None:
    encoder._put_all(b"l", list.__getitem__(value, slice(None)), depth)


def _put_set(encoder: Encoder, value: set, depth: int) -> None:
    encoder._put_all(b"S", [*set.__iter__(value)], depth)


def _put_dict(encoder: Encoder, value: dict, depth: int, tag: bytes = b"d") -> None:
    encoder._put_all(tag, [part for item in dict.items(value) for part in item], depth)


def _put_bytearray(encoder: Encoder, value: bytearray, _: int) -> None:
    encoder.data += b"y"
    encoder._put_bytes(bytes(bytearray.__getitem__(value, slice(None))))


_CONTENTS: dict[type, Callable[[Encoder, Any, int], None]] = {
    list: _put_list,
    set: _put_set,
    dict: _put_dict,
    bytearray: _put_bytearray,
}


def _put_container(encoder: Encoder, value: Any, depth: int) -> None:
    if not encoder._is_shared(value):
        _CONTENTS[_base_of(type(value), _CONTENTS)](encoder, value, depth)  # type: ignore[index]


_WRITERS: dict[type, Callable[[Encoder, Any, int], None]] = {
    type(None): _put_constant,
    bool: _put_constant,
    int: _put_int,
    float: _put_float,
    complex: _put_complex,
    str: _put_str,
    bytes: _put_bytes,
    tuple: _put_tuple,
    frozenset: _put_frozenset,
    range: _put_range,
    type: _put_name,
    type(len): _put_name,
    **{kind: _put_view(tag.encode()) for tag, kind in _EMPTY_VIEWS.items()},
    **dict.fromkeys(_CONTENTS, _put_container),
}
_BY_NAME = (_put_name,)


def _know_loaded_modules() -> None:
    """Adds the types of modules that were loaded since.

    A value of such a type exists only if its module was loaded, and loading one takes time.
    """
    for name in [name for name in _LATE if name in sys.modules]:
        _LATE.pop(name)(sys.modules[name])


def _know_collections(module: Any) -> None:
    """Adds the writers of deque and Counter of the loaded module `collections`."""

    def put_deque(encoder: Encoder, value: Any, depth: int) -> None:
        encoder.data += b"q"
        encoder.put(module.deque.__dict__["maxlen"].__get__(value), depth + 1)
        encoder._put_all(b"l", [*module.deque.__iter__(value)], depth)

    def put_counter(encoder: Encoder, value: Any, depth: int) -> None:
        _put_dict(encoder, value, depth, b"C")

    _CONTENTS.update({module.deque: put_deque, module.Counter: put_counter})
    _WRITERS.update(dict.fromkeys((module.deque, module.Counter), _put_container))


def _know_numbers(module: Any) -> None:
    """Adds the writer of Decimal or Fraction of the loaded module `decimal` or `fractions`."""
    if module.__name__ == "decimal":

        def put_decimal(encoder: Encoder, value: Any, _: int) -> None:
            encoder.data += b"D"
            encoder._put_texts((module.Decimal.__str__(value),))

        _WRITERS[module.Decimal] = put_decimal
    else:

        def put_fraction(encoder: Encoder, value: Any, depth: int) -> None:
            parts = module.Fraction.numerator.__get__(value), module.Fraction.denominator.__get__(value)
            encoder._put_all(b"Q", parts, depth)

        _WRITERS[module.Fraction] = put_fraction


_DATE_FIELDS = "year", "month", "day"
_TIME_FIELDS = "hour", "minute", "second", "microsecond"


def _know_dates(module: Any) -> None:
    """Adds the writers of the four types of the loaded module `datetime`; a time zone travels as its offset."""

    def put_fields(tag: bytes, kind: type, *fields: str) -> Callable[[Encoder, Any, int], None]:
        getters = [kind.__dict__.get(field) or module.date.__dict__[field] for field in fields]

        def put(encoder: Encoder, value: Any, depth: int) -> None:
            parts: list[Any] = [getter.__get__(value) for getter in getters]
            if "hour" in fields:
                zone = kind.__dict__["utcoffset"](value) if kind.__dict__["tzinfo"].__get__(value) else None
                parts += [kind.__dict__["fold"].__get__(value), zone]
            encoder._put_all(tag, parts, depth)

        return put

    _WRITERS[module.datetime] = put_fields(b"M", module.datetime, *_DATE_FIELDS, *_TIME_FIELDS)
    _WRITERS[module.date] = put_fields(b"a", module.date, *_DATE_FIELDS)
    _WRITERS[module.time] = put_fields(b"m", module.time, *_TIME_FIELDS)
    _WRITERS[module.timedelta] = put_fields(b"e", module.timedelta, "days", "seconds", "microseconds")


_LATE = {
    "collections": _know_collections,
    "decimal": _know_numbers,
    "fractions": _know_numbers,
    "datetime": _know_dates,
}


class Decoder:
    """Reads the values of a frame one after the other.

    Args:
        resolve: returns the object that a reference or an exception (`Raised`) stands for; raises MalformedError if
            there is none. Without it there are no references, and exceptions stay as they are.
        shared: containers that the other side may name by number, in its order; those of the frame are added.
    """

    def __init__(self, data: bytes, resolve: Callable[[Any], Any] | None = None, shared: Iterable[Any] = ()) -> None:
        self.shared = [*shared]
        self._data = data
        self._offset = 0
        self._resolve = resolve
        self._num_values = 0

    def take(self, depth: int = 0) -> Any:
        """Returns the next value.

        Raises:
            MalformedError: the bytes are no value, or exceed a limit.
        """
        self._num_values += 1
        if depth > MAX_DEPTH or self._num_values > MAX_VALUES:
            raise MalformedError("a limit of depth or number of values")
        read = _READERS.get(self._take_bytes(1))
        if read is None:
            raise MalformedError("an unknown tag")
        try:
            return read(self, depth)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # such as one from a date in month 13
            raise MalformedError(f"{type(error).__name__}: {error}") from None

    def take_count(self) -> int:
        """Returns a whole number that is not negative.

        Raises:
            MalformedError: it is longer than five bytes, or cut off.
        """
        count = 0
        for shift in range(0, 35, 7):
            [byte] = self._take_bytes(1)
            count |= (byte & 0x7F) << shift
            if byte < 0x80:
                return count
        raise MalformedError("a number of more than 35 bits")

    def end(self) -> None:
        """Raises MalformedError if bytes are left."""
        if self._offset != len(self._data):
            raise MalformedError("bytes behind the last value")

    def _take_bytes(self, length: int) -> bytes:
        end = self._offset + length
        if end > len(self._data):
            raise MalformedError("a value that is cut off")
        content = self._data[self._offset : end]
        self._offset = end
        return content

    def _take_text(self) -> str:
        return str(self._take_bytes(self.take_count()), "utf-8", "surrogatepass")

    def _take_texts(self) -> list[str]:
        return [self._take_text() for _ in range(self._take_length())]

    def _take_length(self) -> int:
        """Returns the number of the values that follow; each takes at least a byte."""
        count = self.take_count()
        if count > len(self._data) - self._offset:
            raise MalformedError("more values than bytes")
        return count

    def _take_all(self, depth: int) -> list[Any]:
        """Returns the values that `Encoder._put_all` wrote behind the tag.

        Raises:
            MalformedError: as `take`.
        """
        count = self._take_length()
        code = self._take_bytes(1)
        if code == b"*":
            return [self.take(depth + 1) for _ in range(count)]
        if code not in _PACKED:
            raise MalformedError("an unknown code of numbers")
        self._num_values += count
        return [*struct.unpack(f">{count}{code.decode()}", self._take_bytes(8 * count))]

    def _take_listed(self, depth: int, length: int) -> list[Any]:
        values = self._take_all(depth)
        if len(values) != length:
            raise MalformedError(f"{len(values)} parts; expected {length}")
        return values

    def _take_shared(self, container: Any) -> Any:
        self.shared.append(container)
        return container


def _take_float(decoder: Decoder) -> float:
    return _double.unpack(decoder._take_bytes(8))[0]


def _take_int(decoder: Decoder, _: int) -> int:
    return int.from_bytes(decoder._take_bytes(decoder.take_count()), "big", signed=True)


def _take_list(decoder: Decoder, depth: int) -> list:
    # The container comes before its contents: it may contain itself.
    values = decoder._take_shared([])
    values.extend(decoder._take_all(depth))
    return values


def _take_set(decoder: Decoder, depth: int) -> set:
    values = decoder._take_shared(set())
    values.update(decoder._take_all(depth))
    return values


def _fill(mapping: Any, decoder: Decoder, depth: int) -> Any:
    parts = decoder._take_all(depth)
    if len(parts) % 2:
        raise MalformedError("a key without a value")
    dict.update(mapping, zip(parts[::2], parts[1::2], strict=True))
    return mapping


def _take_dict(decoder: Decoder, depth: int) -> dict:
    return _fill(decoder._take_shared({}), decoder, depth)


def _take_counter(decoder: Decoder, depth: int) -> Any:
    from collections import Counter

    return _fill(decoder._take_shared(Counter()), decoder, depth)


def _take_deque(decoder: Decoder, depth: int) -> Any:
    """Returns a deque with its largest length; it is shared before its values are read, as it may contain itself.

    Raises:
        MalformedError: there are no values.
    """
    from collections import deque

    maximum = decoder.take(depth + 1)
    values = decoder._take_shared(deque(maxlen=maximum))
    if decoder._take_bytes(1) != b"l":
        raise MalformedError("a deque without values")
    values.extend(decoder._take_all(depth))
    return values


def _take_tuple_with_names(decoder: Decoder, depth: int) -> tuple:
    """Returns a tuple of a new class, which reads its fields by name.

    Raises:
        MalformedError: it has other values than fields, or names that no field can have.
    """
    name, *fields = decoder._take_texts()
    if decoder._take_bytes(1) != b"t":
        raise MalformedError("names without a tuple")
    values = decoder._take_all(depth)
    is_named = len({*fields}) == len(fields) == len(values) and all(
        field.isidentifier() and field[0] != "_" for field in fields
    )
    if not is_named:
        raise MalformedError("names of fields that a tuple cannot have")

    from operator import itemgetter

    # A new class for each tuple: `namedtuple` would compile source text with names from outside.
    members: dict[str, Any] = {field: property(itemgetter(index)) for index, field in enumerate(fields)}
    members |= {"__slots__": (), "_fields": tuple(fields), "__repr__": _named_text, "_asdict": _named_dict}
    return tuple.__new__(type(name.replace("\0", ""), (tuple,), members), values)


def _named_text(self: Any) -> str:
    return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in zip(self._fields, self, strict=True))})"


def _named_dict(self: Any) -> dict:
    return dict(zip(self._fields, self, strict=True))


def _take_decimal(decoder: Decoder, _: int) -> Any:
    from decimal import Decimal

    [text] = decoder._take_texts()
    if len(text) > MAX_DIGITS:
        raise MalformedError("a Decimal of too many digits")
    return Decimal(text)


def _take_fraction(decoder: Decoder, depth: int) -> Any:
    from fractions import Fraction

    numerator, denominator = decoder._take_listed(depth, 2)
    if type(numerator) is not int or type(denominator) is not int:
        raise MalformedError("a fraction of other numbers")
    return Fraction(numerator, denominator)


def _take_range(decoder: Decoder, depth: int) -> range:
    return range(*decoder._take_listed(depth, 3))


def _take_fields(kind: str, num_fields: int) -> Callable[[Decoder, int], Any]:
    """Returns the reader of a type of `datetime`: from its fields, and for datetime and time also fold and offset."""

    def take(decoder: Decoder, depth: int) -> Any:
        import datetime

        if kind in ("date", "timedelta"):
            return getattr(datetime, kind)(*decoder._take_listed(depth, num_fields))
        *fields, fold, offset = decoder._take_listed(depth, num_fields + 2)
        zone = None if offset is None else datetime.timezone(offset)
        return getattr(datetime, kind)(*fields, zone, fold=fold)

    return take


def _take_name(decoder: Decoder, _: int) -> Any:
    [name] = decoder._take_texts()
    return EXCEPTIONS[name] if name in EXCEPTIONS else BUILT_IN[name]


def _take_raised(decoder: Decoder, depth: int) -> Raised:
    """Returns an exception as it travelled; with `resolve`, what that makes of it.

    Raises:
        MalformedError: it has no name, or its arguments are no tuple.
    """
    text, *names = decoder._take_texts()
    # Arguments have no references and share no containers with the rest of the frame.
    inner = Decoder(decoder._take_bytes(decoder.take_count()))
    arguments = inner.take(depth + 1)
    inner.end()
    if not names or not (arguments is None or type(arguments) is tuple):
        raise MalformedError("an exception without a name, or with other arguments")
    raised = Raised(names, text, arguments)
    return raised if decoder._resolve is None else decoder._resolve(raised)


def _take_own(decoder: Decoder, _: int) -> Any:
    number = decoder.take_count()
    kind = str(decoder._take_bytes(1), "ascii")
    names = decoder._take_texts()
    if kind not in KINDS or not names or decoder._resolve is None:
        raise MalformedError("a reference that means nothing here")
    return decoder._resolve(Reference(number, True, kind, names))


def _take_returned(decoder: Decoder, _: int) -> Any:
    if decoder._resolve is None:
        raise MalformedError("a reference that means nothing here")
    return decoder._resolve(Reference(decoder.take_count(), False))


_READERS: dict[bytes, Callable[[Decoder, int], Any]] = {
    b"N": lambda decoder, depth: None,
    b"T": lambda decoder, depth: True,
    b"F": lambda decoder, depth: False,
    b"i": _take_int,
    b"f": lambda decoder, depth: _take_float(decoder),
    b"c": lambda decoder, depth: complex(_take_float(decoder), _take_float(decoder)),
    b"s": lambda decoder, depth: decoder._take_text(),
    b"b": lambda decoder, depth: decoder._take_bytes(decoder.take_count()),
    b"y": lambda decoder, depth: decoder._take_shared(bytearray(decoder._take_bytes(decoder.take_count()))),
    b"l": _take_list,
    b"t": lambda decoder, depth: tuple(decoder._take_all(depth)),
    b"n": _take_tuple_with_names,
    b"S": _take_set,
    b"Z": lambda decoder, depth: frozenset(decoder._take_all(depth)),
    b"d": _take_dict,
    b"k": lambda decoder, depth: dict.fromkeys(decoder._take_all(depth)).keys(),
    b"v": lambda decoder, depth: dict(enumerate(decoder._take_all(depth))).values(),
    b"x": lambda decoder, depth: dict(decoder._take_all(depth)).items(),
    b"C": _take_counter,
    b"q": _take_deque,
    b"D": _take_decimal,
    b"Q": _take_fraction,
    b"r": _take_range,
    b"a": _take_fields("date", 3),
    b"m": _take_fields("time", 4),
    b"M": _take_fields("datetime", 7),
    b"e": _take_fields("timedelta", 3),
    b"B": _take_name,
    b"E": _take_raised,
    b"R": lambda decoder, depth: decoder.shared[decoder.take_count()],
    b"h": _take_own,
    b"p": _take_returned,
}


def write_back(container: Any, contents: Any) -> None:
    """Gives a container the contents of another one, in place.

    Raises:
        MalformedError: `contents` is another kind of container.
    """
    for kind in (list, bytearray):
        if isinstance(container, kind) and type(contents) is kind:
            kind.__setitem__(container, slice(None), contents)  # type: ignore[arg-type]
            return
    if isinstance(container, set) and type(contents) is set:
        set.clear(container)
        set.update(container, contents)
        return
    if isinstance(container, dict) and isinstance(contents, dict):
        dict.clear(container)
        dict.update(container, contents)
        return

    # The only type left is a deque.
    values: Any = container
    if not hasattr(values, "popleft") or type(contents) is not type(values):
        raise MalformedError(f"contents of another kind for a {type(values).__name__}")
    values.clear()
    values.extend(contents)
