"""Where the shell of a test reads texts of the program as code is found; quoted texts are left alone."""

import pytest

from dist_lm.sandbox.expansions import ANY, HARMLESS, NUMBER, PATTERN, REGEX, WORD, Places, harm, places_of

FUNCTIONS = (b"f", b"g")
FOUND: dict[str, Places] = {
    "(( $(f 1 2) == 6 ))": {("f", "1"): {NUMBER}},
    "[[ $(f 1 2) -eq 6 && $(g) == hello ]]": {("f", "1"): {NUMBER}},
    '[[ "$(f)" -lt 6 ]]': {("f", ""): {NUMBER}},
    "x=$(( `f` + 1 ))": {("f", ""): {NUMBER}},
    "for ((i = 0; i < $(f a); i++)); do :; done": {("$", "i"): {NUMBER}, ("f", "a"): {NUMBER}},
    "got=$(f 3); (( got == 6 ))": {("$", "got"): {NUMBER}, ("f", "3"): {NUMBER}},
    'let "x = $(f)"': {("f", ""): {NUMBER}},
    'declare -i got="$(f a)"; [ "$got" = 3 ]': {("f", "a"): {NUMBER}},
    "expr $(f) = 6 > /dev/null": {("f", ""): {WORD}},
    "candidate() { f \"$@\"; }\n[[ $(candidate 4) -eq 8 ]]": {
        ("candidate", "4"): {NUMBER}, ("f", ANY): {NUMBER}, ("g", ANY): {NUMBER},
    },
    "if ! [ $(f 'a b') = 6 ]; then false; fi": {("f", "a b"): {WORD}},
    "test $(f \"$x\" < in) = 6": {("f", ANY): {WORD}},
    'got="$(f x)"\n[ $got = 6 ] && [ "$(g)" = x ]': {("$", "got"): {WORD}, ("f", "x"): {WORD}},
    "read -r line < <(f); [ $line = 6 ]": {("$", "line"): {WORD}, ("f", ANY): {WORD}, ("g", ANY): {WORD}},
    "[[ 6 == $(f) ]] || [[ $(f) != $(g) ]]": {("f", ""): {PATTERN}, ("g", ""): {PATTERN}},
    "[[ ! 6 == $(f) ]]; [ $( { g a; } ) = 6 ]": {("f", ""): {PATTERN}, ("g", "a"): {WORD}},
    "got=($(f 1 2)); [ ${got[0]} = 1 ]": {("$", "got"): {WORD}, ("f", ANY): {WORD}, ("g", ANY): {WORD}},
    "x=\"it's $'\"; [ $(f) = 3 ]": {("f", ""): {WORD}},
    "[[ 6 =~ $(f) ]]": {("f", ""): {REGEX}},
    "# don't\n[ $(f 1\n) = 3 ]": {("f", "1"): {WORD}},
    "cat > in <<EOF\nit's\nEOF\n[ $(f) = 3 ]": {("f", ""): {WORD}},
    "f <<< 'a b'; [ $(f) = 3 ]": {("f", ""): {WORD}},
}  # fmt: skip
PLAIN = [
    '[ "$(f 1)" = 6 ] && [[ $(f) == 6 ]] && [[ 6 == "$(f)" ]]',
    '[ "$(f "$(g a)")" = x ]; test "$(f)" -eq 6',
    "diff <(f 7 8) <(echo 15) && f | grep -qx 15",
    "[ \"$(f '((')\" = $'no\\'' ]",
    "cat > in <<'EOF'\n[ $(f) ]\nEOF\nf in",
    "[[ -z $(f) ]]; [[ 'a (( $(f) ' == b ]]",
]


@pytest.mark.parametrize("code", FOUND)
def test_where_texts_are_code(code: str):
    assert places_of(code.encode(), FUNCTIONS) == FOUND[code]


@pytest.mark.parametrize("code", PLAIN)
def test_where_texts_are_texts(code: str):
    assert places_of(code.encode(), FUNCTIONS) == {}


@pytest.mark.parametrize("code", ["$(", '"', "'", "[[ ", "((", "${", "`", "[ $(f", "<<EOF", "\\", "$((", 'a="$(f'])
def test_code_that_ends_early_is_read_to_its_end(code: str):
    """Such code does not reach a judge, but a reader that waits for what never comes would not end."""
    places_of(code.encode(), FUNCTIONS)


HARM = {
    NUMBER: ((b"6", b" 6 \n", b"-4\n", b"3.5", b"", b"1 2", b"0x1F"), (b"0, 1", b"want", b"a[0]", b"1 || 1", b"5-5")),
    WORD: ((b"word\n", b"", b"a/b.c", b"-3"), (b"a b", b"1 -o 1", b"x\n-o\nx", b"*", b"a?", b"[a]")),
    PATTERN: ((b"A B", b"f(x)", b"", b"a+b"), (b"*", b"?", b"[a]", b"!(x)", b"+(x)", b"\\a")),
    REGEX: ((b"A B",), (b"", b".", b"a|", b"x*", b"^")),
}


@pytest.mark.parametrize("place", HARMLESS)
def test_which_texts_are_code(place: str):
    harmless, harmful = HARM[place]
    places: Places = {("f", "a"): {place}}
    assert [text for text in harmless if harm(places, (b"f", b"a"), text)] == []
    assert [text for text in harmful if not harm(places, (b"f", b"a", b"b"), text)] == []
    assert not any(harm(places, words, text) for words in ((b"f",), (b"f", b"b"), (b"g", b"a")) for text in harmful)
    assert harm({("f", ANY): {place}}, (b"f",), harmful[0]) == place
