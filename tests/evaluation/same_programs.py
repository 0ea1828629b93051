"""Mutants of our references that do the same, by the reason: (problem, changed line)."""

_COUNTS = (
    "tr '[:upper:]' '[:lower:]' | tr -s '[:space:]' '\\n' | grep . | sort | uniq -c | sort {} | awk '{{print $2, $1}}'"
)
_SHARE = "kind, ROUND(100.0 * SUM(price * stock) / (SELECT SUM(price * stock) FROM items), 1) FROM items GROUP BY kind"

SAME_PROGRAMS = (
    # a word or a number without its last newline, which $(...) removes
    ("bash/hello", "printf 'Hello, world!'"),
    ("bash/count_arguments", "printf $#"),
    ("bash/text_length", 'printf "${#1}"'),
    ("bash/is_file", 'if [ -f "$1" ]; then echo yes; else printf no; fi'),
    ("bash/is_file", 'if [ -f "$1" ]; then printf yes; else echo no; fi'),
    ("bash/larger", 'if [ "$1" -gt "$2" ]; then echo "$1"; else printf "$2"; fi'),
    ("bash/parity", "if (($1 % 2 == 0)); then echo even; else printf odd; fi"),
    ("bash/parity", "if (($1 % 2 == 0)); then printf even; else echo odd; fi"),
    ("bash/factorial", 'printf "$result"'),
    ("bash/fizzbuzz", "if ((i % 15 == 0)); then printf FizzBuzz"),
    ("bash/is_prime", "if (($1 % d == 0)); then printf no; return; fi"),
    ("bash/is_prime", "if (($1 < 2)); then printf no; return; fi"),
    ("bash/to_binary", "if ((n == 0)); then printf 0; return; fi"),
    ("bash/to_binary", 'printf "$out"'),
    ("bash/balanced", "*) printf no; return ;;"),
    ("bash/balanced", 'if [ -z "$stack" ]; then printf yes; else echo no; fi'),
    ("bash/roman", 'printf "$out"'),
    # a variable that is set before it is read
    ("bash/fizzbuzz", "without local i"),
    ("bash/is_prime", "without local d"),
    ("bash/rename_all", "without local f"),
    # more divisors are tried
    ("bash/is_prime", "for ((d = 2; d + d <= $1; d++)); do"),
    ("python/is_prime", "for d in range(2, int(n *+ 0.5) + 1):"),
    # 0 has no sign; any size is above -2; no character stands behind the last one
    ("python/absolute", "return x if x >= 1 else -x"),
    ("bash/sum_lines", "awk '{s += $1} END {print s - 0}'"),
    ("bash/largest_file", 'local best="" size=-2 f n'),
    ("bash/reverse", "for ((i = ${#1} + 1; i >= 0; i--)); do"),
    # of lines with equal counts, `sort` compares the rest as well
    ("bash/word_counts", _COUNTS.format("-k1,1nr -k2,3")),
    ("bash/word_counts", _COUNTS.format("-k1,1nr -k3,2")),
    ("bash/word_counts", _COUNTS.format("-k1,2nr -k2,2")),
    # minus a text is 0, and SQLite's groups come in order
    ("sql/age_by_city", "city, AVG(age) FROM people WHERE city IS NOT NULL GROUP BY city ORDER BY -city;"),
    ("sql/count_by_kind", "kind, COUNT(*) FROM items GROUP BY kind ORDER BY -kind;"),
    ("sql/large_kinds", "kind FROM items GROUP BY kind HAVING COUNT(*) >= 2 ORDER BY -kind;"),
    ("sql/price_by_kind", "kind, MAX(price) FROM items GROUP BY kind ORDER BY -kind;"),
    ("sql/share_of_kind", f"{_SHARE} ORDER BY -kind;"),
    # all years begin with the same digit
    ("sql/by_month", "substr(day, 1, 7), SUM(amount) FROM orders GROUP BY substr(day, 2, 7) ORDER BY 1;"),
)

TOLD_APART = {
    # the same for the fixed tests, where a line follows only in the hidden ones: it is appended to FizzBuzz
    ("bash/fizzbuzz", "if ((i % 15 == 0)); then printf FizzBuzz"),
}
"""Those that the hidden tests of key 11 find to be wrong."""
