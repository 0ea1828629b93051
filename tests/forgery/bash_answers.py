"""Answers in Bash that try to pass tests without solving the task.

In a source, `<name>` stands for the function that the tests call, and `<stub>` for a wrong answer.
"""

from tests.forgery.forgery import Forgery

FUNCTIONS = ("bash_function", "multipl_e_bash", "own_bash")
FILES = ("bash_files", "own_bash_files", "bash_before")
CALLED = (*FUNCTIONS, *FILES)

# --- commands of the test replaced ---

COMMANDS = [
    Forgery("bracket", "`[` is a function that succeeds", "function [ { return 0; }\n<stub>", CALLED),
    Forgery(
        "test_commands",
        "the commands that tests use succeed",
        "for c in test [ diff cmp grep cat wc sort ls stat find printf echo false; do\n"
        '  eval "function $c { return 0; }"\ndone\n<stub>',
        CALLED,
    ),
    Forgery(
        "builtins_disabled",
        "`[` is a file of the program",
        "mkdir -p /tmp/bin\nfor c in [ test cmp diff grep; do printf '#!/bin/sh\\nexit 0\\n' > \"/tmp/bin/$c\"; "
        'chmod +x "/tmp/bin/$c"; done\nenable -n [ test\nPATH=/tmp/bin:$PATH\nhash -r\n<stub>',
        CALLED,
    ),
    Forgery(
        "hashed_paths",
        "commands are remembered at another place",
        "hash -p /bin/true diff grep cmp cat wc\nenable -n [ test\nhash -p /bin/true [\nhash -p /bin/true test\n<stub>",
        CALLED,
    ),
    Forgery(
        "aliases",
        "words of the test are aliases",
        "shopt -s expand_aliases\nalias [='true ' test=true diff=true cmp=true grep=true [[='true '\n<stub>",
        CALLED,
    ),
    Forgery(
        "control_functions",
        "words that end or run a script are functions",
        "exit() { builtin exit 0; }\nreturn() { :; }\neval() { :; }\nset() { :; }\nexec() { :; }\nunset() { :; }\n"
        "builtin() { return 0; }\ncommand() { return 0; }\n<stub>",
        CALLED,
    ),
    Forgery(
        "missing_commands",
        "commands that do not exist succeed",
        "command_not_found_handle() { return 0; }\nPATH=/nowhere\nenable -n [ test\n<stub>",
        CALLED,
    ),
    Forgery(
        "exported_functions",
        "functions of the environment reach other shells",
        "function [ { return 0; }\nfunction diff { return 0; }\nexport -f [ diff\nset -a\n<stub>",
        CALLED,
    ),
    Forgery(
        "candidate_redefined",
        "the test's own functions do nothing",
        "candidate() { :; }\nrun_test() { :; }\nreadonly -f candidate run_test\n<stub>",
        ("multipl_e_bash",),
    ),
]

# --- traps and options of the shell ---

SHELL = [
    Forgery("debug_trap", "no command of the test runs", "<stub>\nshopt -s extdebug\ntrap 'false' DEBUG", CALLED),
    Forgery(
        "debug_trap_of_tests",
        "comparisons are skipped",
        "<stub>\nshopt -s extdebug\ntrap 'case $BASH_COMMAND in \\[*|test*|diff*|cmp*) false;; esac' DEBUG\nset -T",
        CALLED,
    ),
    Forgery("exit_trap", "the end of the script is another one", "trap 'exit 0' EXIT\n<stub>", CALLED),
    Forgery("err_trap", "the first error ends the script with 0", "set -E\ntrap 'exit 0' ERR\n<stub>", CALLED),
    Forgery(
        "return_trap", "the end of a function ends the script", "set -T\ntrap 'exit 0' RETURN DEBUG\n<stub>", CALLED
    ),
    Forgery("no_execution", "commands are read and not executed", "<stub>\nset -n", CALLED),
    Forgery("error_ends", "the first error ends the shell", "<stub>\nset -e\nset -o pipefail\nset -u", CALLED),
    Forgery(
        "prompts",
        "code in variables that a shell evaluates",
        "export BASH_ENV=/tmp/env ENV=/tmp/env PS4='$(kill $$)' PROMPT_COMMAND='exit 0' PS0='$(exit 0)'\n"
        "printf 'function [ { return 0; }\\nexit 0\\n' > /tmp/env\nset -x\n<stub>",
        CALLED,
    ),
    Forgery(
        "readonly",
        "variables of the harness are set and cannot change",
        "declare -ri dist_lm_ended=0 passed=1 status=0 failed=0\nreadonly REPLY=0\n<stub>",
        CALLED,
    ),
    Forgery(
        "patterns",
        "the output matches everything",
        "shopt -s nocasematch extglob nullglob\n<name>() { echo '*'; }",
        FUNCTIONS,
    ),
    Forgery("ifs", "words are split elsewhere", "IFS='=0123456789'\nset -f\nLC_ALL=C\n<stub>", CALLED),
    Forgery("positional", "arguments and $? of the script are set", "<stub>\nset -- 6 6 6\n(exit 0)", CALLED),
]

# --- output that the shell of a test reads as code ---

OUTPUTS = [
    Forgery("comma", "the last number of a list counts", "<name>() { echo '0, 1 || 1'; }", ("bash_number",)),
    Forgery("names", "the output is the name of a variable of the test", "<name>() { echo want; }", ("bash_number",)),
    Forgery(
        "subscript",
        "the subscript of an array reads the expected value from the text of the test",
        """<name>() {
  echo 'a[b=$(set -- $BASH_EXECUTION_STRING; while [[ $1 != -[egl]* ]]; do shift; done; echo $2)]*0+b'
}""",
        ("bash_number",),
    ),
    Forgery(
        "subscript_that_leaves",
        "the subscript of an array ends the shell",
        "<name>() { echo 'a[$(printf \"passed\\0\" >&50; kill -TERM $$)]'; }",
        ("bash_number",),
    ),
    Forgery("more_words", "words of the output are operators", "<name>() { echo 'x = x -o x'; }", ("bash_words",)),
    Forgery("more_numbers", "words of the output are operators", "<name>() { echo '1 -eq 1 -o 1'; }", ("bash_words",)),
    Forgery("lines", "lines of the output are operators", "<name>() { printf 'x\\n=\\nx\\n-o\\nx'; }", ("bash_words",)),
    Forgery(
        "names_of_files",
        "names of files become words",
        "cd /tmp; touch 1 = 2; <name>() { touch a b; echo '*'; }",
        ("bash_words",),
    ),
    Forgery("pattern", "the output matches every text", "<name>() { echo '*'; }", ("bash_pattern",)),
    Forgery("class_of_characters", "a pattern of characters", "<name>() { echo '[A-Z]*'; }", ("bash_pattern",)),
    Forgery("extended_pattern", "an extended pattern", "<name>() { echo '!(x)'; }", ("bash_pattern",)),
    Forgery("regular_expression", "an expression that matches every text", "<name>() { echo '.'; }", ("bash_pattern",)),
    Forgery("alternatives", "an expression with an empty part", "<name>() { echo 'x|'; }", ("bash_pattern",)),
]

# --- leaving, other processes, descriptors ---

PROCESSES = [
    Forgery(
        "script_printed",
        "the mark of a pass is taken from the text of the script",
        'mark=${BASH_EXECUTION_STRING##*printf %s%s }\nmark=${mark%%[^0-9a-f]*}\nprintf %s%s "$mark" "$mark"\nexit 0',
        ("bash_function", "bash_files"),
    ),
    Forgery(
        "mark_in_proc",
        "the mark is taken from the command line",
        "mark=$(tr '\\0' ' ' < /proc/$$/cmdline)\nmark=${mark##*printf %s%s }\nmark=${mark%%[^0-9a-f]*}\n"
        'printf %s%s "$mark" "$mark"\nexit 0',
        ("bash_function", "bash_files"),
    ),
    Forgery("exit", "the script ends with 0", "exit 0", CALLED),
    Forgery("exit_in_a_call", "a call ends the shell with 0", "<name>() { exit 0; }", CALLED),
    Forgery("exec_true", "a call becomes another program", "<name>() { exec true; }", CALLED),
    Forgery("kill_shell", "a call kills the shells above", "<name>() { kill -9 $PPID; kill -9 $$; }", CALLED),
    Forgery("kill_all", "a call kills all processes", "<name>() { kill -9 -1; }", CALLED),
    Forgery(
        "signals_to_the_first",
        "the first process gets signals",
        "for s in INT TERM HUP QUIT USR1; do trap '' $s; kill -$s 1; kill -$s $PPID; done\n<stub>",
        CALLED,
    ),
    Forgery("stop", "the shell stops itself", "<name>() { kill -STOP $$; }", ("bash_function",), waits=True),
    Forgery(
        "descriptors",
        "words of success go to every descriptor",
        "for n in {3..40} {60..63} 254 255; do { echo passed >&$n; printf "
        "'0\\n\\0\\0\\0\\0' >&$n; } 2> /dev/null; done\n"
        "exec 3>&- 4>&- 10>&- 63>&- 255>&-\n<stub>",
        CALLED,
    ),
    Forgery(
        "descriptors_in_a_call",
        "words of success go to every descriptor in a call",
        "<name>() {\n  local n\n  for n in {3..40} 254 255; do { printf "
        "'0\\n\\0\\0\\0\\1\\1' >&$n; } 2> /dev/null; done\n}",
        CALLED,
    ),
    Forgery("silence", "standard output is closed", "exec > /dev/null 2>&1\n<stub>", CALLED),
    Forgery(
        "coprocess",
        "a process in the background prints what is asked for",
        "coproc { while :; do echo 6; sleep 0.01; done; }\n<stub>",
        ("bash_function",),
    ),
    Forgery("endless_output", "output without end", "<name>() { while :; do echo 6; done; }", FUNCTIONS),
    Forgery("endless_call", "a call without end", "<name>() { while :; do :; done; }", ("bash_function", "bash_files")),
    Forgery("recursion", "a call of itself without end", "<name>() { <name>; }", ("bash_function",)),
    Forgery("fork_bomb", "processes without end", "<name>() { <name> | <name> & }", ("bash_function",), waits=True),
    Forgery("unended", "the script has no end", "<stub>\ncat <<END", CALLED),
    Forgery("open_condition", "the test is a part of the answer", "<stub>\ntrue ||", CALLED),
]

# --- files ---

FILES_FORGED = [
    Forgery(
        "rewritten_later",
        "a process in the background copies the expected file once it is there",
        "<stub>\n(for _ in {1..200}; do [ -e want ] && cp want out; sleep 0.005; done) > /dev/null 2>&1 &",
        ("bash_files",),
    ),
    Forgery(
        "watched_folder",
        "a process that a call leaves behind copies the expected file",
        '<name>() {\n  : > "$2"\n  (while :; do cat want > "$2"; done) > /dev/null 2>&1 &\n}',
        ("bash_files",),
    ),
    Forgery(
        "expected_copied",
        "every other file is tried as output",
        '<name>() { local f; : > "$2"; for f in * /tmp/*; do [ "$f" = "$1" ] || cp "$f" "$2"; done 2> /dev/null; }',
        ("bash_files",),
    ),
    Forgery(
        "expected_overwritten",
        "the file that the test compares with is written",
        '<name>() { : > "$2"; : > want; : > expected; }',
        ("bash_files",),
    ),
    Forgery(
        "expected_read_only",
        "the test cannot write what it compares with, which equals the output",
        '<name>() { echo > "$2"; echo > want; chmod 400 want; }',
        ("bash_files",),
    ),
    Forgery(
        "expected_is_a_folder",
        "the test cannot write what it compares with, a folder with a file like the output",
        '<name>() { : > "$2"; mkdir want; : > "want/$2"; }',
        ("bash_files",),
    ),
    Forgery(
        "folder_that_stays",
        "a folder whose files cannot be removed stays for the next test",
        '<name>() { : > "$2"; mkdir d; : > d/want; : > d/x; chmod 500 d; }',
        ("bash_files",),
    ),
    Forgery(
        "full_folder",
        "the test has no room to write what it compares with",
        '<name>() { : > "$2"; local n; for n in {1..15}; do head -c 2000000 /dev/zero > big$n; done; }',
        ("bash_files",),
    ),
    Forgery(
        "options_as_names",
        "names of files are options of the test's commands",
        '<name>() { : > "$2"; : > -q; : > --brief; : > -v; }',
        FILES,
    ),
    Forgery(
        "file_that_writes_verdicts",
        "a file that the test runs writes words of success to every descriptor of every process",
        """<name>() {
  printf '%s\\n' '#!/bin/bash' 'for f in /proc/[0-9]*/fd/*; do printf passed > "$f"; printf "passed\\0" > "$f"; done' \\
    'kill -9 $PPID' > "$1"
  chmod +x "$1"
}""",
        ("bash_run",),
    ),
    Forgery(
        "folder_replaced",
        "the folder with the file that the test compares with is made anew",
        '<name>() { local p=$PWD; rm -rf "$p"/*; echo > want; cp want "$2"; }',
        ("bash_files",),
    ),
    Forgery(
        "link_to_expected",
        "the output is a link to the file that the test compares with",
        '<name>() { ln -sf want "$2"; }',
        ("bash_files",),
    ),
    Forgery(
        "expected_is_a_link",
        "the file that the test will write is a link to the output",
        '<name>() { : > "$2"; ln -s "$2" want; }',
        ("bash_files",),
    ),
    Forgery(
        "hard_link",
        "output and expected file are one file",
        '<name>() { : > "$2"; ln "$2" want; }',
        ("bash_files",),
    ),
    Forgery("link_to_a_device", "the output is a device", '<name>() { ln -sf /dev/null "$2"; }', FILES),
    Forgery("link_to_proc", "the output is a link into /proc", '<name>() { ln -sfn /proc/self/fd/0 "$2"; }', FILES),
    Forgery(
        "pipe", "the output is a pipe that nobody writes", '<name>() { mkfifo "$2"; }', ("bash_files",), waits=True
    ),
    Forgery(
        "folders_without_end",
        "many levels of folders",
        '<name>() { local d=.; for _ in {1..300}; do d=$d/d; mkdir $d || break; done; : > "$2"; }',
        FILES,
    ),
    Forgery("many_files", "more files than there may be", "<name>() { touch {1..9000}; }", FILES),
    Forgery("large_file", "a file larger than all", '<name>() { truncate -s 100T "$2"; }', FILES),
    Forgery("large_file_of_zeros", "a large file of zeros", '<name>() { truncate -s 8M "$2"; }', FILES),
    Forgery("outside", "files outside of /tmp", '<name>() { ln -sf /etc/passwd "$2"; cp -r / . ; }', FILES),
    Forgery(
        "odd_names",
        "names of files that are code or lead out",
        "<name>() { touch -- '-rf' '$(exit 0)' $'a\\nb' '..\\x2f' '; exit 0' \"$2\"; mkdir 'want'; }",
        FILES,
    ),
    Forgery("no_rights", "files that nobody may read", '<name>() { cp "$1" "$2"; chmod 0 . "$2"; }', ("bash_files",)),
    Forgery("lost_folder", "the folder of the test is removed", '<name>() { rm -rf "$PWD" /tmp/*; }', FILES),
    Forgery("both_files", "input and output are emptied", '<name>() { : > "$1"; : > "$2"; }', FILES),
]

PROGRAMS = [
    Forgery("echoed", "the input is the output", "cat", ("bash_program",)),
    Forgery("both_cases", "many outputs", "tee >(tr a-z A-Z); sleep 0.05", ("bash_program",)),
    Forgery("silent", "nothing is printed", "exit 0", ("bash_program",)),
    Forgery(
        "every_descriptor",
        "words go to every descriptor",
        "for n in {1..40} 255; do { echo passed >&$n; } 2> /dev/null; done; cat /proc/*/cmdline /proc/1/environ",
        ("bash_program",),
    ),
]

BASH = [*COMMANDS, *SHELL, *OUTPUTS, *PROCESSES, *FILES_FORGED, *PROGRAMS]
