"""The program of `dist-lm import`: a model of transformers as a run that a stage can start from.

    work/runs/import/NAME/
      checkpoints/step_00000000/   weights in fp32
      tokenizer/                   tokenizer.json or tokenizer.model, with the same ids
      tokenizer/conversations.json its chat template, if that lays conversations out otherwise than ours
      chat_template.jinja          if the model has one
      conf/model/NAME.yaml         its shape, for --config-dir
      config.yaml                  where it came from

One tensor is in memory at a time.
"""

import re
from collections.abc import Callable

from dist_lm.errors import ArtefactError, require
from dist_lm.interop.adapter_folder import holds_adapters
from dist_lm.stages.importing.adapters import import_adapters
from dist_lm.stages.importing.whole_model import import_snapshot, snapshot_at
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory

STAGE = "import"  # folder below runs/


def import_model(
    source: str,
    name: str,
    work: WorkDirectory,
    base: str = "",
    add_marks: bool = False,
    say: Callable[[str], object] = str,
) -> RunDirectory:
    """Writes the run `import/NAME` in the work directory and returns it; it may download the model.

    Adapters become a run of adapters over a run of their base, which is imported too unless it is there.

    Args:
        source: a folder with config.json, weights and tokenizer, a folder of adapters that peft saved, a GGUF file, or
            the id of one on the Hugging Face hub.
        base: folder, hub id, or a run of ours, that adapters are put over; by default what they name.
        add_marks: as in `import_snapshot`.
        say: gets a line for people, about a base that the adapters name.

    Raises:
        ConfigError: `name` is no name of a run, or adapters are to get marks.
        ArtefactError: the folder lacks a file, the model has an option or tensor that ours lacks (the message names
            it), or the run exists or cannot be written.
        UserError: a package that is needed is not installed.
        OSError: a file cannot be read or written.
    """
    accepted = "letters, digits, '.', '_', '-', the first one a letter or digit"
    require(re.fullmatch(r"\w[\w.-]*", name, re.ASCII) is not None, "NAME", name, accepted)
    run = work.run(STAGE, name)
    if run.path.exists():
        raise ArtefactError(f"{run.path} exists: give another name, or remove it first")
    with snapshot_at(source) as folder:
        if holds_adapters(folder):
            accepted = f"false: {source} holds adapters; merge them first (peft: merge_and_unload)"
            require(not add_marks, "tokenizer.add_marks", add_marks, accepted)
            return import_adapters(folder, source, run, base, say)
        accepted = "nothing: SOURCE holds a whole model, and only adapters of peft have a base"
        require(not base, "--base", base, accepted)
        return import_snapshot(folder, source, run, add_marks=add_marks)
