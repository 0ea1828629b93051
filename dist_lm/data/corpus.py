"""Which sources a corpus has, the readers that they name, and the form of their documents."""

from typing import get_args

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.sources.reader import source_form
from dist_lm.document import Form
from dist_lm.errors import ConfigError


def corpus_sources(config: CorpusConfig, corpus_name: str) -> list[SourceConfig]:
    """The sources of one corpus.

    Raises:
        ConfigError: there is no such corpus or reader, or the readers give documents of several forms.
    """
    sources = config.corpora.get(corpus_name)
    if not sources:
        there = ", ".join(sorted(config.corpora)) or "none"
        problem = "has no sources" if corpus_name in config.corpora else "does not exist"
        raise ConfigError(f"corpus {corpus_name} {problem} in corpus={config.name}: the corpora there are {there}")
    found = {source_form(source) for source in sources}
    forms = [form for form in get_args(Form) if form in found]
    if len(forms) > 1:
        raise ConfigError(
            f"corpus {corpus_name}: readers {', '.join(source.reader for source in sources)} give "
            f"{' and '.join(f'{form}s' for form in forms)}: put each kind into a corpus of its own"
        )
    return list(sources)


def form_of(config: CorpusConfig, corpus_name: str) -> Form:
    """What the documents of a corpus are."""
    return source_form(corpus_sources(config, corpus_name)[0])


def corpora_of_form(config: CorpusConfig, form: Form) -> list[str]:
    """The names of the corpora whose documents are of this form."""
    return [name for name in config.corpora if form_of(config, name) == form]


def text_corpora(config: CorpusConfig) -> list[str]:
    """The names of the corpora of texts: the tokenizer is trained on them."""
    return corpora_of_form(config, "text")
