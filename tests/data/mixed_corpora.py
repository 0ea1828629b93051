"""Small corpora of texts that have everything a build decides on, for tests of builds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from dist_lm.config.corpus import CleaningConfig, CorpusConfig, SourceConfig

SECRET = "ghp_0123456789abcdefghijABCDEFGHIJ012345"


def random_text(generator: random.Random, earlier: Sequence[str]) -> str:
    """Returns a text of its own, or an earlier one: whole, with other line ends, or as a part of a longer one."""
    text = "\n".join(" ".join(f"w{generator.randrange(10**6)}" for _ in range(8)) for _ in range(5))
    kind = generator.random()
    if not earlier or kind < 0.5:
        return text
    copied = generator.choice(earlier)
    if kind < 0.65:
        return copied
    if kind < 0.75:
        return copied.replace("\n", "\r\n")
    if kind < 0.9:
        return f"{copied}\n{text}"
    return generator.choice(["", "x" * 2000, f"{text} me@example.org {SECRET}", "one two", f"{text} one two {text}"])


def write_corpora(folder: Path, generator: random.Random, held_out: bool) -> CorpusConfig:
    """Returns two corpora of rows and files: with copies in one corpus and across both, licences, and broken rows."""
    earlier: list[str] = []
    corpora: dict[str, list[SourceConfig]] = {}
    for corpus in ("first", "second"):
        for number in range(3):
            lines = []
            for _ in range(15):
                earlier.append(random_text(generator, earlier))
                row = {"text": earlier[-1], "licence": generator.choice(["mit", "gpl-3.0"])}
                lines.append("broken" if generator.random() < 0.05 else json.dumps(row))
            path = folder / corpus / "rows" / f"{number}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines))
        for number in range(20):
            earlier.append(random_text(generator, earlier))
            path = folder / corpus / "code" / f"project{number % 4}" / f"{number}.py"
            (path.parent / ".git").mkdir(parents=True, exist_ok=True)
            path.write_text(earlier[-1], newline="")

        corpora[corpus] = [
            SourceConfig("jsonl", "english", path=[f"{folder / corpus / 'rows'}/*.jsonl"], licence_column="licence"),
            SourceConfig("files", "", licence="mit", path=[str(folder / corpus / "code")]),
        ]
    if held_out:
        (folder / "val.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in earlier[::9] if text.strip())
        )
        corpora["second"].append(
            SourceConfig("jsonl", "english", path=[str(folder / "val.jsonl")], licence="mit", held_out=True)
        )

    cleaning = CleaningConfig(licences=["mit"]) if generator.random() < 0.5 else CleaningConfig()
    return CorpusConfig(
        "test",
        corpora,
        val_fraction=0.3,
        val_tokens=4000 if held_out else 700,
        max_document_bytes=1500,
        max_bad_fraction=0.5,
        cleaning=cleaning,
    )
