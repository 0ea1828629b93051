"""Forms of documents that a training stage reads: texts, conversations or rankings, and errors for others."""

from dataclasses import dataclass
from typing import ClassVar

from dist_lm.config.root import Config
from dist_lm.data.sources.reader import form_of
from dist_lm.document import Form
from dist_lm.errors import ConfigError

READER_OF: dict[Form, str] = {"text": "files", "conversation": "messages", "ranking": "rankings"}


@dataclass
class CorpusFormsConfig(Config):
    """The configuration of a stage that trains on documents of `corpus_forms`."""

    corpus_forms: ClassVar[tuple[Form, ...]] = ("text", "conversation")
    without_corpus: ClassVar[str] = ""  # end of the message of a stage that can do without its corpus: how

    def corpus_refusal(self, name: str) -> str:
        """Returns the message that refuses stage.corpus=`name`: what the stage needs, what there is, and the way out.

        Raises:
            ConfigError: a source is invalid.
        """
        forms = {corpus: form_of(self.corpus, corpus) for corpus in self.corpus.corpora}
        needed = " or ".join(f"{form}s" for form in self.corpus_forms)
        readers = " or ".join(READER_OF[form] for form in self.corpus_forms)
        suitable = [corpus for corpus, form in forms.items() if form in self.corpus_forms]

        # A stage file names the corpus, so the user may never have heard of it.
        problem = f"stage.corpus={name}: stage {self.stage.name} needs {needed}; corpus={self.corpus.name}"
        if suitable:
            if name not in forms:
                problem += f" has no corpus {name}, but"
            way_out = f"has them in {', '.join(suitable)}: give stage.corpus={suitable[0]}"
        else:
            present = "no corpus"
            if forms:
                present = "only " + " and ".join(f"{form}s" for form in dict.fromkeys(forms.values()))
            way_out = f"has {present}: add a source with reader {readers}"
            if name not in forms:
                way_out += f" to corpora.{name or 'NAME'}"
        return f"{problem} {way_out}{self.without_corpus}"


def require_form(config: Config) -> None:
    """Refuses a stage.corpus whose documents are not of the stage's forms; returns nothing.

    Raises:
        ConfigError: the message says which corpora would do, or which reader gives such documents.
    """
    assert isinstance(config, CorpusFormsConfig)
    name = config.stage.corpus
    if name not in config.corpus.corpora or form_of(config.corpus, name) not in config.corpus_forms:
        raise ConfigError(config.corpus_refusal(name))
