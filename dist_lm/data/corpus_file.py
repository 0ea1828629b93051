"""The text of a corpus file that `dist-lm data new` writes, and the commands that train on it.

Values of data (names of columns, files, languages) reach the file as scalars of a YAML writer, or in comments without
line breaks. The text is read back and compared before anything is written.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_lm.data.propose import Proposal
from dist_lm.errors import ConfigError

CONVERSATIONS = "tools"  # corpus that stage=tools reads
MIXED = ("code", "language")  # corpora that stage=tools mixes in
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a corpus file: the launch reads it as a word, not as a number
PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")  # scalars that need no quotes
UNSET = "# of all documents, such as MIT; data inspect counts documents by licence"


class _Writer(yaml.SafeDumper):
    """Writes text on one line, quoted unless it is a plain word or path."""


def _scalar(writer: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if PLAIN.fullmatch(text) else '"'
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _scalar)


def one_line(text: str) -> str:
    """`text` with escapes for line breaks and all other characters that do not print."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def check_name(name: str, taken: Sequence[str]) -> None:
    """Refuse a name that `corpus=NAME` would not choose.

    Args:
        taken: the corpus files of dist_lm.
    """
    if name in taken:
        raise ConfigError(f"--out: corpus={name} is a file of dist_lm, and would be used instead: choose another name")
    is_number = name.lower() in ("inf", "nan")  # for Hydra
    if is_number or not NAME.fullmatch(name) or not isinstance(yaml.safe_load(name), str):
        raise ConfigError(
            f"--out: corpus={one_line(name)} would not choose this file: expected a name of letters, digits, _, - and "
            ". that is no number, true, false or null"
        )


def corpus_file(
    command: Sequence[str],
    out: Path,
    by_corpus: Mapping[str, Sequence[Proposal]],
    documents: Mapping[str, Mapping[str, int]],
    remarks: Sequence[str] = (),
) -> str:
    """The text of the corpus file.

    Args:
        command: what was typed.
        documents: by corpus and language.
        remarks: comments on the whole file.

    Raises:
        ConfigError: the text would not be read as it is meant.
    """
    comments = [f"Written by: {shlex.join(command)}", *(f"  {one}" for one in next_commands(out, [*by_corpus]))]
    lines = [f"# {one_line(comment)}" for comment in (*comments, *remarks)]
    lines += [*_yaml({"name": out.stem}), "corpora:"]
    meant: dict[str, list[dict[str, Any]]] = {}
    for name, proposals in by_corpus.items():
        lines += [f"  {name}:"]
        for proposal in proposals:
            source = dict(proposal.source)
            has_licence = "licence_column" in source
            source |= {} if has_licence else {"licence": ""}
            meant.setdefault(name, []).append(source)
            lines += [f"    # {one_line(note)}" for note in (proposal.inputs.summary(), *proposal.notes)]
            lines += [f"    {line}" for line in _yaml([source])]
            lines[-1] += "" if has_licence else f"  {UNSET}"
        languages = ", ".join(f"{language} {count:,}" for language, count in documents[name].items())
        lines += [f"    # documents: {one_line(languages)}"]
    text = "\n".join([*lines, ""])
    _check(text, {"name": out.stem, "corpora": meant}, out)
    return text


def next_commands(out: Path, corpora: Sequence[str]) -> Iterator[str]:
    """How to train on the file: a line for each stage, in the order of the pipeline.

    A stage starts from the model of the stage before, and stage=tools mixes in the corpora of both: what the file lacks
    is left out.
    """
    words = ["python", "-m", "dist_lm.launch", "--config-dir", str(out.parent.parent), f"corpus={out.stem}"]
    before = ""
    for stage in ("language", "code", CONVERSATIONS):
        if stage not in corpora:
            continue
        extra = []
        if not before and stage != "language":
            extra = ["stage.init_from=none"]
        elif (before, stage) == ("language", CONVERSATIONS):
            extra = ["stage.init_from=work/runs/language/default"]
        missing = [name for name in MIXED if name not in corpora] if stage == CONVERSATIONS else []
        extra += ["stage.mix=null"] if len(missing) == len(MIXED) else [f"stage.mix.{name}=0" for name in missing]
        yield shlex.join([*words, f"stage={stage}", *extra])
        before = stage


def _yaml(value: Any) -> list[str]:
    text = yaml.dump(value, Dumper=_Writer, sort_keys=False, width=1 << 30, allow_unicode=True)
    return text.removesuffix("\n").split("\n")


def _check(text: str, meant: Mapping[str, Any], out: Path) -> None:
    """Read the text as the launch does.

    Raises:
        ConfigError: it holds something else than `meant`.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        found = one_line(str(error))
    if found != meant:
        raise ConfigError(
            f"--out {one_line(str(out))}: not written: a launch would read {one_line(str(found))[:300]} "
            f"instead of {one_line(str(meant))[:300]}: rename the column or file with the unusual name"
        )
