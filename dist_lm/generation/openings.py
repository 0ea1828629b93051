"""How documents of a language usually begin, as far as a run says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.errors import ArtefactError, UserError
from dist_lm.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class Openings:
    """The prompts that a run samples from at its end (`stage.sampling.prompts`), and what it was trained on."""

    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by language
    corpus: str = ""
    languages: Sequence[str] = ()  # of the corpus

    def of(self, language: str) -> Sequence[str]:
        """Openings of a language, at least one.

        Raises:
            UserError: there are none; the message says which languages have some.
        """
        if prompts := self.prompts.get(language):
            return prompts
        others = ", ".join(name for name, prompts in self.prompts.items() if prompts)
        way_out = f"/lang takes {others}; or" if others else "nor of any other:"
        raise UserError(
            f"/lang {language}: the run names no opening of that language; {way_out} type a beginning yourself"
        )

    def __str__(self) -> str:
        known = ", ".join(name for name, prompts in self.prompts.items() if prompts)
        said = f"there are openings for {known}" if known else "this run has openings for no language"
        if self.languages:
            said += f" (corpus {self.corpus} holds {', '.join(self.languages)})"
        return said


def read_openings(run: RunDirectory | None) -> Openings:
    """Those of a run; of a checkpoint without one, none.

    Raises:
        ArtefactError: the run's configuration cannot be read.
    """
    if run is None:
        return Openings()
    try:
        config: Any = OmegaConf.load(run.config)
        prompts = OmegaConf.select(config, "stage.sampling.prompts") or {}
        corpus = OmegaConf.select(config, "stage.corpus") or ""
        found = {str(language): [str(prompt) for prompt in several] for language, several in prompts.items()}
    except Exception as error:  # whatever YAML and OmegaConf raise for a file that is not theirs
        raise ArtefactError(f"{run.config}: cannot be read ({' '.join(str(error).split())})") from error
    languages: Sequence[str] = ()
    if corpus and manifest_path(run.work.corpus(corpus)).is_file():  # corpora may have stayed on the cluster
        languages = sorted(read_manifest(run.work.corpus(corpus)).splits["train"].languages)
    return Openings(found, corpus, languages)
