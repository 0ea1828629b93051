"""Rankings of a model's samples by rules, without people or a network: a function of (seed, model, corpus of programs).

Prompts are the first lines of programs. Half of the samples of a prompt continue it as text, as in stage code; the
other half answer it as a turn of a conversation, as the policy of stage rlhf does. All samples of a prompt are ranked
together (`data.rankings.rules`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.ranking import Ranking, ranks_of_scores
from dist_lm.chat.template import prompt, stop_tokens
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.evaluation_batches import spread
from dist_lm.data.keys import Shuffle, key
from dist_lm.data.rankings.rules import marks_of
from dist_lm.data.sources.rankings import ranking_document
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import Answer, Request, SamplingParams, only_answers
from dist_lm.sandbox.syntax import PARSERS, parses_continued
from dist_lm.stages.rankings.stage import RankingSamplesConfig, RankingsConfig
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.console import Console

DEFAULT_RANKINGS = 300
CACHE_TOKENS = 16384
LONGEST_OPENING = 200  # characters
MOST_LINES = 4  # longest opening in lines


@dataclass(frozen=True)
class Opening:
    """The first lines of a program."""

    language: str
    text: str
    place: str  # corpus and document


@dataclass(frozen=True)
class Sample:
    """A completion of an opening."""

    text: str
    finished: bool  # ended with end-of-text or a stop token


def ranked_samples(source: SourceConfig, config: RankingsConfig, console: Console) -> Iterator[Candidate]:
    """A ranking, or the reason why there is none, for each of `source.limit` openings (0: `DEFAULT_RANKINGS`).

    Raises:
        ArtefactError: there is no model, or no program in the corpus.
    """
    if config.stage.init_from == "none":
        raise ArtefactError(
            f"corpus source {source.reader}: stage.init_from=none: expected a run or checkpoint that generates samples"
        )
    work = WorkDirectory(Path(config.work_dir))
    loaded = load_model(Path(config.stage.init_from), work.tokenizer_model)
    corpus = TokenCorpus.open(work.corpus(config.stage.corpus), "train")
    found = openings(corpus, loaded.tokenizer, source.limit or DEFAULT_RANKINGS, config.seed)
    if not found:
        raise ArtefactError(
            f"corpus {corpus.directory} has no documents in {', '.join(PARSERS)}: name another in stage.corpus"
        )
    with console.counting(f"sampling {loaded.name}", unit="samples", total=None) as count:
        for number, samples in sample(loaded, found, config, count.advance):
            opening = found[number]
            name = f"generated:{loaded.name}:seed={config.seed}:{opening.place}"
            ranking = ranking_of_samples(opening, samples)
            if ranking is None:
                yield Rejected(f"{source.language}_{opening.language}", name, "no_ranking")
            else:
                yield ranking_document(ranking, f"{source.language}_{opening.language}", name, source.licence)


def openings(corpus: TokenCorpus, tokenizer: Tokenizer, limit: int, seed: int) -> list[Opening]:
    """The first one to four lines of documents at even distances, in languages that have a parser."""
    codes = [code for code, name in enumerate(corpus.languages) if name in PARSERS]
    documents = [number for number in range(corpus.n_documents) if corpus.language_codes[number] in codes]
    found = []
    for place in spread(len(documents), limit).tolist():
        number = documents[place]
        language = corpus.languages[corpus.language_codes[number]]
        # a token has about one character or more, so this number of tokens covers the opening
        head = tokenizer.decode(corpus.tokens(number, 1, min(int(corpus.lengths[number]), 1 + LONGEST_OPENING)))
        lines = head.splitlines(keepends=True)[: 1 + key(Shuffle.SAMPLE_LINES, seed, number) % MOST_LINES]
        text = "".join(lines)[:LONGEST_OPENING]
        if text.strip():
            found.append(Opening(language, text, f"{corpus.directory.name}:{number}"))
    return found


def sample(
    loaded: LoadedModel, found: Sequence[Opening], config: RankingsConfig, advance: Callable[[], None]
) -> Iterator[tuple[int, list[Sample]]]:
    """(number of an opening, its samples), in the order of the openings."""
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    engine = Engine(
        loaded.config,
        loaded.weights,
        eot_id=loaded.tokenizer.eot_id,
        options=EngineOptions(cache_tokens=max(CACHE_TOKENS, loaded.config.max_seq_len)),
        dtype=torch.float32,  # equal samples on all machines of a kind
        device=device,
    )
    answers: dict[int, list[Answer]] = {}
    for number, opening in enumerate(found):
        requests = requests_of(number, opening, config.stage.samples, config.seed, loaded.tokenizer)
        if any(len(one.prompt) + one.params.max_new_tokens > loaded.config.max_seq_len for one in requests):
            continue
        answers[number] = []
        for request in requests:
            engine.submit(request)
    for done in only_answers(engine.results(), "stage.samples"):
        answers[int(done.request.partition(":")[0])].append(done)
        advance()
    for number, own in answers.items():
        own.sort(key=lambda answer: (answer.request, answer.index))
        yield number, [sample_of(answer, loaded.tokenizer) for answer in own]


def requests_of(
    number: int, opening: Opening, settings: RankingSamplesConfig, seed: int, tokenizer: Tokenizer
) -> list[Request]:
    """The requests for an opening: continuations as text, and answers as a turn."""
    word = key(Shuffle.SAMPLES, seed, number)
    total = settings.fewest + word % (settings.most - settings.fewest + 1)
    params = SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop_tokens=stop_tokens(tokenizer),
    )
    as_turn = prompt(Conversation((Message("user", opening.text),)), tokenizer)
    as_text = tokenizer.encode_prompt(opening.text)
    parts = (("text", as_text, (total + 1) // 2), ("turn", as_turn, total // 2))
    return [
        Request(f"{number}:{kind}", tokens, params, seed=key(word, i) % 2**31, n=n)
        for i, (kind, tokens, n) in enumerate(parts)
    ]


def sample_of(answer: Answer, tokenizer: Tokenizer) -> Sample:
    """The text up to the first special token, which begins another turn or a call."""
    special = set(tokenizer.special_ids.values())
    end = next((place for place, token in enumerate(answer.tokens) if token in special), len(answer.tokens))
    return Sample(tokenizer.decode(answer.tokens[:end]), finished=answer.finish in ("eot", "stop"))


def ranking_of_samples(opening: Opening, samples: Sequence[Sample]) -> Ranking | None:
    """The ranking of different, non-empty samples by quality; None if they all have the same quality."""
    kept = list({one.text: one for one in samples if one.text.strip()}.values())
    scores = [
        marks_of(
            opening.text,
            one.text,
            bool(parses_continued(opening.language, opening.text, one.text, one.finished)),
        ).quality
        for one in kept
    ]
    if len(set(scores)) < 2:
        return None
    return Ranking(
        prompt=Conversation((Message("user", opening.text),)),
        completions=tuple(one.text for one in kept),
        ranks=ranks_of_scores(scores),
    )
