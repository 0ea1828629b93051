"""`python -m dist_lm VERB` = `dist-lm VERB`: everything that is not a stage.

A thin list: each verb lives in its room and is imported only when it is called.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import ArtefactError, UserError

app = typer.Typer(
    name="dist-lm",
    help="What is not a stage. Stages run with `python -m dist_lm.launch stage=S`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at corpora.", no_args_is_help=True)
app.add_typer(data, name="data")


@app.callback()
def verbs() -> None:
    """Keep verbs apart from options, even while there is one."""


@data.command("inspect")
def data_inspect(
    corpus: Annotated[Path, typer.Argument(help="A corpus folder, such as work/corpora/code.")],
) -> None:
    """Documents, tokens and bytes by language and split; shards, sources, licences; a few documents."""
    from rich.console import Console

    from dist_lm.data.inspect import print_corpus

    if not print_corpus(corpus, Console()):
        raise ArtefactError(
            f"{corpus}: not every shard is as its manifest says; remove the folder and run stage=shards"
        )


def main() -> None:
    """Run a verb; what a user can mend is one line on standard error and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
