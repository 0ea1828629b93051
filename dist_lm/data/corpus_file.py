"""Composes the text of a corpus file that `dist-lm data new` writes, and the commands that train on it.

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
RANKINGS = "rankings"  # corpus that stage=preference and stage=reward read
MODEL = "stage.init_from=hf:FOLDER"  # stands for an open model, which a file of preferences alone does not bring
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # names of corpus files
PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")  # scalars that need no quotes
UNSET = "# of all documents, such as MIT; data inspect counts documents by licence"


class _Writer(yaml.SafeDumper):
    """Writes text on one line, quoted unless it is a plain word or path."""


def _scalar(writer: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if PLAIN.fullmatch(text) else '"'
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _scalar)


def one_line(text: str) -> str:
    """Replaces line breaks and all other characters that do not print by escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def check_name(name: str, reserved_names: Sequence[str]) -> None:
    """Refuses a name that `corpus=NAME` would not choose; returns nothing.

    Args:
        reserved_names: the corpus files of dist_lm.

    Raises:
        ConfigError: the name is reserved, or YAML or Hydra would not read it as a word; names the reason.
    """
    if name in reserved_names:
        raise ConfigError(f"--out: corpus={name} is a file of dist_lm, and would be used instead: choose another name")

    # The launch must read the name as a word. These are numbers for Hydra, and words for YAML.
    is_number = name.lower() in ("inf", "nan")
    if is_number or not NAME.fullmatch(name) or not isinstance(yaml.safe_load(name), str):
        raise ConfigError(
            f"--out: corpus={one_line(name)} would not choose this file: expected a name of letters, digits, _, - and "
            ". that is no number, true, false or null"
        )


def corpus_file(
    written_by: Sequence[str],
    launches: Sequence[str],
    out: Path,
    by_corpus: Mapping[str, Sequence[Proposal]],
    documents: Mapping[str, Mapping[str, int]],
    remarks: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of the corpus file; writes nothing. The text was read back and compared.

    A source without `licence_column` gets an empty `licence`, with a comment that asks the user to fill it in.

    Args:
        written_by: the words of the command line that was typed; the first comment quotes them.
        launches: the command lines that train on the file, for comments.
        out: the path of the file; its stem is `name` in the text.
        by_corpus: the sources of each corpus.
        documents: number of documents by corpus and language, for comments; every corpus must be there.
        remarks: comments on the whole file.
        settings: keys of the group `corpus` beside the corpora, such as `val_fraction`.

    Raises:
        ConfigError: a launch would not read the text as it is meant.
    """
    comments = [f"Written by: {shlex.join(written_by)}", *(f"  {line}" for line in launches)]
    lines = [f"# {one_line(comment)}" for comment in (*comments, *remarks)]
    settings = dict(settings or {})
    lines += [*_yaml({"name": out.stem} | settings), "corpora:"]

    corpora: dict[str, list[dict[str, Any]]] = {}
    for name, proposals in by_corpus.items():
        lines += [f"  {name}:"]
        for proposal in proposals:
            source = dict(proposal.source)
            # An empty licence at the end of the source asks the user to fill it in.
            has_licence = "licence_column" in source
            if not has_licence:
                source["licence"] = ""
            corpora.setdefault(name, []).append(source)

            lines += [f"    # {one_line(note)}" for note in (proposal.inputs.summary(), *proposal.notes)]
            lines += [f"    {line}" for line in _yaml([source])]
            if not has_licence:
                lines[-1] += f"  {UNSET}"
        languages = ", ".join(f"{language} {count:,}" for language, count in documents[name].items())
        lines += [f"    # documents: {one_line(languages)}"]

    text = "\n".join([*lines, ""])
    _check(text, {"name": out.stem} | settings | {"corpora": corpora}, out)
    return text


def are_labelled(by_corpus: Mapping[str, Sequence[Proposal]]) -> bool:
    """Returns whether a source of the rankings has single answers with a label, from which KTO alone learns."""
    return any(proposal.preferences == "labelled" for proposal in by_corpus.get(RANKINGS, ()))


def next_commands(
    out: Path, corpora: Sequence[str], further: Sequence[str] = (), labelled: bool = False
) -> Iterator[str]:
    """Yields the commands that train on the file: a line for each stage, in the order of the pipeline.

    The stages are language, code, tools, and preference and reward for the corpus of rankings, as far as `corpora`
    names them; other corpora give no line. By default a stage starts from the model of the stage before, and
    stage=tools mixes in the corpora of both. Overrides take out what the file lacks. `further` overrides end every
    command.

    Args:
        labelled: `are_labelled` of the file.
    """
    # `corpus=NAME` names a file in the folder corpus/ of --config-dir.
    command = ["python", "-m", "dist_lm.launch", "--config-dir", str(out.parent.parent)]
    for overrides in stage_overrides(out.stem, corpora, labelled):
        yield shlex.join([*command, *overrides, *further])


def stage_overrides(name: str, corpora: Sequence[str], labelled: bool = False) -> Iterator[list[str]]:
    """Yields the overrides of each command of `next_commands`, without the `further` ones.

    Args:
        name: of the corpus file, without its folder and its ending.
        corpora: names of the corpora in the file.
        labelled: `are_labelled` of the file: its rankings are single completions with labels, which stage=preference
            learns from with algorithm=kto, instead of stage=preference and stage=reward.
    """
    previous_stage = ""
    for stage in ("language", "code", CONVERSATIONS):
        if stage not in corpora:
            continue

        # Without a stage before there is no model to start from; stage=tools would start from stage=code.
        overrides = []
        if not previous_stage and stage != "language":
            overrides = ["stage.init_from=none"]
        elif (previous_stage, stage) == ("language", CONVERSATIONS):
            overrides = ["stage.init_from=work/runs/language/default"]

        if stage == CONVERSATIONS:
            missing = [name for name in MIXED if name not in corpora]
            if len(missing) == len(MIXED):
                overrides += ["stage.mix=null"]
            else:
                overrides += [f"stage.mix.{name}=0" for name in missing]
        yield [f"corpus={name}", f"stage={stage}", *overrides]
        previous_stage = stage

    if RANKINGS in corpora:
        start = MODEL
        if previous_stage:
            start = f"stage.init_from=work/runs/{previous_stage}/default"
        if labelled:
            yield [f"corpus={name}", "stage=preference", "stage.preference.algorithm=kto", start]
            return
        for stage in ("preference", "reward"):
            yield [f"corpus={name}", f"stage={stage}", start]


def _yaml(content: Any) -> list[str]:
    text = yaml.dump(content, Dumper=_Writer, sort_keys=False, width=1 << 30, allow_unicode=True)
    return text.removesuffix("\n").split("\n")


def _check(text: str, expected: Mapping[str, Any], out: Path) -> None:
    """Reads the text as the launch does and compares it; returns nothing.

    Raises:
        ConfigError: it is no YAML, or holds something else than `expected`, as `${...}` in a name would; names `out`.
    """
    # A name with ${...} in it would be replaced.
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        parsed = one_line(str(error))
    if parsed != expected:
        raise ConfigError(
            f"--out {one_line(str(out))}: not written: a launch would read {one_line(str(parsed))[:300]} "
            f"instead of {one_line(str(expected))[:300]}: rename the column or file with the unusual name"
        )
