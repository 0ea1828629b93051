"""Draws the inputs of hidden tests of our own problems: one generator for each, by the name of the problem.

Inputs stay within what the request of a problem says, and every right answer gives the same value for them: prices and
days of a table all differ, so no order is open, and means are exact however they are summed. A change of what a key
gives is a new version of the tests (`dist_lm.config.evaluation.OWN_TESTS`).
"""

import random
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from dist_lm.sandbox.hidden import Case
from dist_lm.sandbox.inputs import table_of
from dist_lm.sandbox.program import Language

Rng = random.Random

HIDDEN_TESTS: dict[Language, int] = {"python": 4, "bash": 4, "sql": 3}  # tests of each problem
WORDS = (
    *("apple", "bread", "cloud", "dance", "eagle", "flame", "grass", "honey", "island", "jelly", "knife", "lemon"),
    *("mango", "night", "ocean", "paper", "queen", "river", "stone", "tiger", "uncle", "voice", "water", "yellow"),
)
BRACKETS = ("()", "[]", "{}")


def case_of(language: Language, name: str, prompt: str) -> Callable[[Rng], Case] | None:
    """Returns the generator of a problem; None: it has no inputs.

    Args:
        prompt: of the problem; for SQL, it names the tables.
    """
    if language == "python":
        return lambda rng: Case(f"{name}({', '.join(map(repr, PYTHON[name](rng)))})")
    if language == "bash":
        return BASH.get(name)
    columns_of = dict(re.findall(r"^-- table (\w+)\((.*?)\)", prompt, re.MULTILINE))
    return lambda rng: Case(before=database(columns_of, rng, days_ascend=name == "days_since"))


# --- values ---


def integers(rng: Rng, low: int, high: int, shortest: int, longest: int) -> list[int]:
    """Returns a list of random length, both ends included."""
    return [rng.randint(low, high) for _ in range(rng.randint(shortest, longest))]


def words(rng: Rng, shortest: int, longest: int) -> list[str]:
    """Returns words that may occur more than once."""
    return [rng.choice(WORDS) for _ in range(rng.randint(shortest, longest))]


def phrase(rng: Rng) -> str:
    """Returns one to three words, some of them numbers."""
    return " ".join(rng.choice((rng.choice(WORDS), str(rng.randint(2, 99)))) for _ in range(rng.randint(1, 3)))


def capitals(rng: Rng, text: str) -> str:
    """Returns the text with some words in upper case or with a capital."""
    return " ".join(rng.choice((word, word.title(), word.upper())) for word in text.split(" "))


def letters(rng: Rng, alphabet: str, shortest: int, longest: int) -> str:
    """Returns a text of random length."""
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(shortest, longest)))


def name_of_file(rng: Rng) -> str:
    """Returns a name, with a blank in some."""
    return rng.choice((rng.choice(WORDS), f"{rng.choice(WORDS)} {rng.choice(WORDS)}"))


def brackets(rng: Rng) -> str:
    """Returns nested brackets with letters, in half of the cases with one character replaced or dropped."""
    text = ""
    for _ in range(rng.randint(1, 4)):
        opening, closing = rng.choice(BRACKETS)
        text = rng.choice((f"{opening}{text}{closing}", f"{text}{opening}{rng.choice('abc')}{closing}"))

    if rng.random() < 0.5:
        position = rng.randrange(len(text))
        text = text[:position] + rng.choice(("", rng.choice("()[]{}"))) + text[position + 1 :]
    return text


# --- Python: the arguments of the function ---


def _shape(rng: Rng, rows: int, columns: int) -> list[list[int]]:
    return [[rng.randint(-9, 9) for _ in range(columns)] for _ in range(rows)]


def _transpose(rng: Rng) -> tuple[Any, ...]:
    return (_shape(rng, rng.randint(1, 4), rng.randint(1, 4)),)


def _matrix_product(rng: Rng) -> tuple[Any, ...]:
    rows, inner, columns = (rng.randint(1, 3) for _ in range(3))
    return _shape(rng, rows, inner), _shape(rng, inner, columns)


def _clamp(rng: Rng) -> tuple[Any, ...]:
    low = rng.randint(-50, 50)
    return rng.randint(-99, 99), low, low + rng.randint(0, 50)


def _palindrome(rng: Rng) -> tuple[Any, ...]:
    half = letters(rng, "abc", 1, 4)
    return (half + half[::-1] if rng.random() < 0.5 else half + letters(rng, "abc", 1, 4),)


def _invert(rng: Rng) -> tuple[Any, ...]:
    keys = rng.sample(WORDS, rng.randint(1, 5))
    return (dict(zip(keys, rng.sample(range(100), len(keys)), strict=True)),)


def _gcd(rng: Rng) -> tuple[Any, ...]:
    # Two numbers that are drawn alone seldom have a common divisor.
    divisor = rng.randint(1, 20)
    return divisor * rng.randint(1, 30), divisor * rng.randint(1, 30)


def _caesar(rng: Rng) -> tuple[Any, ...]:
    return capitals(rng, phrase(rng)) + rng.choice(("", "!", "?")), rng.randint(-13, 25)


def _topological_order(rng: Rng) -> tuple[Any, ...]:
    n = rng.randint(2, 6)
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    # Few edges, so that most graphs have no cycle.
    return rng.sample(pairs, rng.randint(0, min(n, len(pairs)))), n


PYTHON: Mapping[str, Callable[[Rng], tuple[Any, ...]]] = {
    "add": lambda rng: (rng.randint(-99, 99), rng.randint(-99, 99)),
    "double": lambda rng: (rng.randint(-999, 999),),
    "is_even": lambda rng: (rng.randint(-999, 999),),
    "square": lambda rng: (rng.randint(-99, 99),),
    "larger": lambda rng: (rng.randint(-99, 99), rng.randint(-99, 99)),
    "length": lambda rng: (integers(rng, 0, 9, 0, 12),),
    "greet": lambda rng: (capitals(rng, phrase(rng)),),
    "first": lambda rng: (rng.choice((integers(rng, -99, 99, 1, 6), words(rng, 1, 4))),),
    "last": lambda rng: (rng.choice((integers(rng, -99, 99, 1, 6), words(rng, 1, 4))),),
    "negate": lambda rng: (rng.randint(-999, 999),),
    "to_upper": lambda rng: (capitals(rng, phrase(rng)),),
    "area": lambda rng: (rng.randint(1, 99), rng.randint(1, 99)),
    "total": lambda rng: (integers(rng, -99, 99, 0, 8),),
    "contains": lambda rng: (integers(rng, 0, 9, 1, 9), rng.randint(0, 9)),
    "join_words": lambda rng: (words(rng, 1, 5),),
    "absolute": lambda rng: (rng.randint(-999, 999),),
    "reverse_text": lambda rng: (phrase(rng),),
    "count_vowels": lambda rng: (capitals(rng, phrase(rng)),),
    "evens": lambda rng: (integers(rng, -99, 99, 1, 8),),
    "squares": lambda rng: (rng.randint(0, 30),),
    "factorial": lambda rng: (rng.randint(0, 30),),
    # Every sum of so many quotients by 1, 2, 4 or 8 is exact.
    "mean": lambda rng: ([rng.randint(-99, 99) for _ in range(rng.choice((1, 2, 4, 8)))],),
    "is_palindrome": _palindrome,
    "clamp": _clamp,
    "word_lengths": lambda rng: (rng.choice((" ", "  ", " \n")).join(words(rng, 1, 5)) + rng.choice(("", " ")),),
    "unique": lambda rng: (integers(rng, 0, 9, 2, 10),),
    "invert": _invert,
    "sign": lambda rng: (rng.randint(-99, 99) / rng.choice((1, 2)),),
    "digits_sum": lambda rng: (rng.randint(0, 10 ** rng.randint(1, 9)),),
    "fizzbuzz": lambda rng: (rng.randint(1, 200) * rng.choice((1, 1, 3, 5)),),
    "fibonacci": lambda rng: (rng.randint(0, 60),),
    "is_prime": lambda rng: (rng.randint(-9, 99) * rng.choice((1, 1, 7)) + rng.randint(0, 1),),
    "gcd": _gcd,
    "count_words": lambda rng: (capitals(rng, " ".join(rng.choice(WORDS[:4]) for _ in range(rng.randint(1, 8)))),),
    "flatten": lambda rng: ([integers(rng, -9, 9, 0, 4) for _ in range(rng.randint(1, 4))],),
    "running_sums": lambda rng: (integers(rng, -99, 99, 1, 8),),
    "second_largest": lambda rng: (integers(rng, 0, 20, 0, 6),),
    "transpose": _transpose,
    "caesar": _caesar,
    "chunks": lambda rng: (integers(rng, 0, 99, 1, 9), rng.randint(1, 4)),
    "merge_sorted": lambda rng: (sorted(integers(rng, 0, 30, 0, 6)), sorted(integers(rng, 0, 30, 0, 6))),
    "to_binary": lambda rng: (rng.randint(0, 10 ** rng.randint(1, 6)),),
    "balanced": lambda rng: (brackets(rng),),
    "roman": lambda rng: (rng.randint(1, 3999),),
    "longest_run": lambda rng: (integers(rng, 0, 2, 1, 10),),
    "run_lengths": lambda rng: (letters(rng, "ab", 1, 9),),
    "matrix_product": _matrix_product,
    "edit_distance": lambda rng: (letters(rng, "abc", 0, 7), letters(rng, "abc", 1, 7)),
    "longest_increasing": lambda rng: (integers(rng, -20, 20, 1, 9),),
    "topological_order": _topological_order,
}


# --- Bash: a call of the function, with arguments, standard input or files ---


def call(name: str, *arguments: Any) -> Case:
    """Returns the case of a call that prints something."""
    return Case(_words_of_bash(name, *arguments))


def piped(name: str, lines: Sequence[str]) -> Case:
    """Returns the case of a call that reads lines."""
    return Case(f"{_print(lines)} | {name}")


def with_file(name: str, lines: Sequence[str], *arguments: Any, then: str = "") -> Case:
    """Returns the case of a call whose last argument is a file with lines.

    Args:
        then: what follows the call, such as a pipe.
    """
    return Case(_words_of_bash(name, *arguments, "f") + then, before=f"cd /tmp && {_print(lines)} > f")


def _print(lines: Sequence[str]) -> str:
    if not lines:
        return "printf ''"
    return "printf '%s\\n' " + _words_of_bash(*lines)


def _words_of_bash(*values: Any) -> str:
    return " ".join(shlex.quote(str(value)) for value in values)


def _make_folders(rng: Rng) -> Case:
    folder = shlex.quote("/".join([*rng.sample(WORDS, rng.randint(1, 3)), name_of_file(rng)]))
    return Case(f"[ -d {folder} ] && echo made", before=f"cd /tmp && make_folders {folder}")


def _copy(rng: Rng) -> Case:
    source, target = _two_names(rng)
    before = f"cd /tmp && {_print(words(rng, 1, 3))} > {source} && copy {source} {target}"
    return Case(f"cat {target}; [ -f {source} ] && echo kept", before)


def _rename(rng: Rng) -> Case:
    source, target = _two_names(rng)
    before = f"cd /tmp && {_print(words(rng, 1, 3))} > {source} && rename {source} {target}"
    return Case(f"cat {target}; [ -e {source} ] || echo gone", before)


def _two_names(rng: Rng) -> tuple[str, str]:
    first, second = rng.sample(WORDS, 2)
    return shlex.quote(first + rng.choice(("", " 1", ".txt"))), shlex.quote(second + rng.choice(("", " 2", ".md")))


def _is_file(rng: Rng) -> Case:
    path = shlex.quote(name_of_file(rng))
    make = rng.choice((f"echo 1 > {path}", f"mkdir {path}", "true"))
    return Case(f"is_file {path}", before=f"cd /tmp && {make}")


def _matching_lines(rng: Rng) -> Case:
    lines = [" ".join(words(rng, 1, 2)) for _ in range(rng.randint(2, 6))]
    # Two letters of a line, so that at least one line matches.
    return with_file("matching_lines", lines, rng.choice(lines)[1:3])


def _count_matching(rng: Rng) -> Case:
    forms = ("ERROR {}", "{} ERROR", "{} error", "{}")
    return piped("count_matching", [rng.choice(forms).format(rng.choice(WORDS)) for _ in range(rng.randint(1, 6))])


def _replace_text(rng: Rng) -> Case:
    lines = [" ".join(rng.choice((*WORDS[:3], "cat", "cats", "concat")) for _ in range(rng.randint(1, 5)))]
    return piped("replace_text", lines + words(rng, 0, 2))


def _extension(rng: Rng) -> Case:
    return call("extension", ".".join(words(rng, 2, 4)))


def _base(rng: Rng) -> Case:
    folders = rng.choice(("", "/")) + "".join(f"{word}/" for word in words(rng, 0, 3))
    return call("base", f"{folders}{name_of_file(rng)}.{rng.choice(('txt', 'md'))}")


def _most_frequent(rng: Rng) -> Case:
    # The counts differ, so the line is the only one.
    lines = rng.sample(WORDS, rng.randint(1, 3))
    counts = rng.sample(range(1, 6), len(lines))
    repeated = [line for line, count in zip(lines, counts, strict=True) for _ in range(count)]
    rng.shuffle(repeated)
    return piped("most_frequent", repeated)


def _rename_all(rng: Rng) -> Case:
    names = rng.sample(WORDS, rng.randint(2, 5))
    num_logs = rng.randint(0, len(names) - 1)
    files = [f"d/{name}.{'log' if index < num_logs else 'txt'}" for index, name in enumerate(names)]
    return Case("ls d", before=f"cd /tmp && mkdir d && touch {_words_of_bash(*files)} && rename_all d")


def _empty_lines(rng: Rng) -> Case:
    return piped("empty_lines", [rng.choice((rng.choice(WORDS), f" {rng.choice(WORDS)}", "", "  ")) for _ in range(5)])


def _csv_sum(rng: Rng) -> Case:
    names = rng.sample(WORDS, 3)
    return piped("csv_sum", [f"{rng.choice(names)},{rng.randint(1, 99)}" for _ in range(rng.randint(2, 7))])


def _word_counts(rng: Rng) -> Case:
    names = rng.sample(WORDS, 4)
    lines = [" ".join(rng.choice(names) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    return piped("word_counts", [capitals(rng, line) for line in lines])


def _largest_file(rng: Rng) -> Case:
    names = rng.sample(WORDS, rng.randint(2, 4))
    # All sizes differ, so one file is the largest.
    sizes = rng.sample(range(1, 20), len(names))
    written = [f"echo {'x' * size} > d/{name}" for name, size in zip(names, sizes, strict=True)]
    return Case("largest_file d", before=f"cd /tmp && mkdir d && {' && '.join(written)}")


def _transpose_lines(rng: Rng) -> Case:
    columns = rng.randint(1, 4)
    rows = [" ".join(rng.choice(WORDS) for _ in range(columns)) for _ in range(rng.randint(1, 4))]
    return piped("transpose", rows)


def _options(rng: Rng) -> Case:
    chosen = rng.sample((("-u",), ("-n", rng.randint(1, 5))), rng.randint(0, 2))
    return call("options", *(part for option in chosen for part in option), phrase(rng))


def _lines(rng: Rng, fewest: int = 1) -> list[str]:
    return [phrase(rng) for _ in range(rng.randint(fewest, 5))]


BASH: Mapping[str, Callable[[Rng], Case]] = {
    "say": lambda rng: call("say", capitals(rng, phrase(rng)) + rng.choice(("", "%", "!"))),
    "greet": lambda rng: call("greet", capitals(rng, phrase(rng))),
    "add": lambda rng: call("add", rng.randint(-99, 99), rng.randint(-99, 99)),
    "subtract": lambda rng: call("subtract", rng.randint(-99, 99), rng.randint(-99, 99)),
    "multiply": lambda rng: call("multiply", rng.randint(-99, 99), rng.randint(-99, 99)),
    "count_arguments": lambda rng: call("count_arguments", *_lines(rng, 0)),
    "upper": lambda rng: call("upper", capitals(rng, phrase(rng))),
    "lower": lambda rng: call("lower", capitals(rng, phrase(rng))),
    "text_length": lambda rng: call("text_length", phrase(rng)),
    "count_lines": lambda rng: with_file("count_lines", words(rng, 0, 30), then=" | tr -d ' '"),
    "show": lambda rng: with_file("show", _lines(rng)),
    "sorted_lines": lambda rng: piped("sorted_lines", words(rng, 1, 6)),
    "first_line": lambda rng: with_file("first_line", _lines(rng)),
    "last_line": lambda rng: with_file("last_line", _lines(rng)),
    "make_folders": _make_folders,
    "copy": _copy,
    "rename": _rename,
    "is_file": _is_file,
    "larger": lambda rng: call("larger", rng.randint(-99, 99), rng.randint(-99, 99)),
    "parity": lambda rng: call("parity", rng.randint(0, 9999)),
    "count_to": lambda rng: call("count_to", rng.randint(1, 30)),
    "each_argument": lambda rng: call("each_argument", *_lines(rng)),
    "matching_lines": _matching_lines,
    "count_matching": _count_matching,
    "replace_text": _replace_text,
    "second_column": lambda rng: piped("second_column", [" ".join(words(rng, 2, 4)) for _ in range(rng.randint(1, 4))]),
    "unique_lines": lambda rng: piped("unique_lines", [rng.choice(WORDS[:6]) for _ in range(rng.randint(1, 8))]),
    "extension": _extension,
    "base": _base,
    "sum_arguments": lambda rng: call("sum_arguments", *integers(rng, -99, 99, 1, 6)),
    "sum_lines": lambda rng: piped("sum_lines", [str(n) for n in integers(rng, -99, 99, 1, 6)]),
    "factorial": lambda rng: call("factorial", rng.randint(0, 20)),
    "reverse": lambda rng: call("reverse", phrase(rng)),
    "largest": lambda rng: call("largest", *integers(rng, -99, 99, 1, 6)),
    "fizzbuzz": lambda rng: call("fizzbuzz", rng.randint(1, 40)),
    "number_lines": lambda rng: piped("number_lines", [rng.choice(("", " ")) + line for line in _lines(rng)]),
    "join_by": lambda rng: call("join_by", rng.choice((",", ":", " - ", "+", "; ")), *_lines(rng)),
    "most_frequent": _most_frequent,
    "rename_all": _rename_all,
    "is_prime": lambda rng: call("is_prime", rng.randint(1, 99) * rng.choice((1, 1, 7)) + rng.randint(0, 1)),
    "empty_lines": _empty_lines,
    "csv_sum": _csv_sum,
    "word_counts": _word_counts,
    "largest_file": _largest_file,
    "to_binary": lambda rng: call("to_binary", rng.randint(0, 10 ** rng.randint(1, 6))),
    "transpose": _transpose_lines,
    "options": _options,
    "balanced": lambda rng: call("balanced", brackets(rng)),
    "roman": lambda rng: call("roman", rng.randint(1, 3999)),
}


# --- SQL: the rows of the tables that a prompt names ---

ITEMS = (
    *("pen", "paper", "pan", "pot", "pin", "plate", "desk", "lamp", "mug", "cup", "rope", "ball", "ink", "vase"),
    *("axe", "bowl"),
)
PEOPLE = (
    *("Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kim", "Lea", "Max", "Ned", "Oda", "Pia"),
    *("Ray", "Sue", "Tom", "Una"),
)
KINDS = ("office", "kitchen", "furniture", "sport")
CITIES = ("Oslo", "Rome", "Bern", "Graz", None)
FIRST_DAY = date(2023, 12, 1)
DAYS = 120  # from the first one on


def database(columns_of: Mapping[str, str], rng: Rng, days_ascend: bool) -> str:
    """Returns statements that make the tables of a problem, of `people`, `items` and `orders`.

    Args:
        columns_of: by table, as in CREATE TABLE.
        days_ascend: whether the days of orders have the order of their ids.
    """
    people, items = _people(rng), _items(rng)
    buyers, bought = ([row[0] for row in rows] for rows in (people, items))
    rows_of = {"people": people, "items": items, "orders": _orders(rng, buyers, bought, days_ascend)}
    return "\n".join(table_of(name, columns, rows_of[name]) for name, columns in columns_of.items())


def _people(rng: Rng) -> list[tuple[Any, ...]]:
    """Returns people, at least one in Oslo and one without a city."""
    count = rng.randint(4, 9)
    numbers, names = sorted(rng.sample(range(1, 40), count)), rng.sample(PEOPLE, count)
    cities = ["Oslo", None, *rng.choices(CITIES, k=count - 2)]
    rng.shuffle(cities)
    return [
        (number, name, rng.randint(15, 70), city) for number, name, city in zip(numbers, names, cities, strict=True)
    ]


def _items(rng: Rng) -> list[tuple[Any, ...]]:
    """Returns items whose prices differ, at least one of them out of stock.

    The value of all stock is an odd number of halves: no kind's share of it then lies in the middle of two numbers with
    one digit after the point, where the way to compute it decides how it is rounded.
    """
    while True:
        count = rng.randint(4, 9)
        numbers, names = sorted(rng.sample(range(1, 40), count)), rng.sample(ITEMS, count)
        halves = rng.sample(range(1, 80), count)
        stocks = [0, *(rng.randint(0, 50) for _ in range(count - 1))]
        rng.shuffle(stocks)
        if sum(price * stock for price, stock in zip(halves, stocks, strict=True)) % 2:
            return [
                (number, name, half / 2, rng.choice(KINDS), stock)
                for number, name, half, stock in zip(numbers, names, halves, stocks, strict=True)
            ]


def _orders(rng: Rng, people: Sequence[int], items: Sequence[int], days_ascend: bool) -> list[tuple[Any, ...]]:
    # Some people and items have no order.
    buyers, bought = (rng.sample(numbers, rng.randint(2, len(numbers) - 1)) for numbers in (people, items))
    count = rng.randint(5, 10)
    numbers, days = sorted(rng.sample(range(1, 40), count)), rng.sample(range(DAYS), count)
    if days_ascend:
        days.sort()
    return [
        (
            number,
            rng.choice(buyers),
            rng.choice(bought),
            rng.randint(1, 9),
            (FIRST_DAY + timedelta(days=day)).isoformat(),
        )
        for number, day in zip(numbers, days, strict=True)
    ]
