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
from dist_lm.data.evaluation_batches import evenly_spaced
from dist_lm.data.order import Shuffle, key
from dist_lm.data.rankings.rules import marks_of
from dist_lm.data.sources.rankings import ranking_document
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import Answer, Request, SamplingParams, only_answers
from dist_lm.sandbox.syntax import PARSERS, parses_continued
from dist_lm.stages.rankings.config import RankingSamplesConfig, RankingsConfig
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.console import Console

DEFAULT_RANKINGS = 300
CACHE_TOKENS = 16384
LONGEST_BEGINNING = 200  # characters
MOST_LINES = 4  # longest beginning in lines


@dataclass(frozen=True)
class Beginning:
    """The first lines of a program."""

    language: str
    text: str
    origin: str  # corpus and number of the document


@dataclass(frozen=True)
class Sample:
    """A completion of a beginning."""

    text: str
    finished: bool  # ended with end-of-text or a stop token


def ranked_samples(source: SourceConfig, config: RankingsConfig, console: Console) -> Iterator[Candidate]:
    """Yields a ranking, or the reason why there is none, for each of `source.limit` beginnings (0: `DEFAULT_RANKINGS`).

    It loads the model of stage.init_from and generates all samples before the first ranking.

    Raises:
        ArtefactError: there is no model, no program in the corpus, or the model's logits are not numbers.
        UserError: the tokenizer lacks the mark that ends a turn.
        OSError: a file cannot be read.
    """
    if config.stage.init_from == "none":
        raise ArtefactError(
            f"corpus source {source.reader}: stage.init_from=none: expected a run or checkpoint that generates samples"
        )
    work = WorkDirectory(Path(config.work_dir))
    loaded = load_model(Path(config.stage.init_from), work.tokenizer_model)
    corpus = TokenCorpus.open(config.corpus_in(work, config.stage.corpus), "train")
    chosen = beginnings(corpus, loaded.tokenizer, source.limit or DEFAULT_RANKINGS, config.seed)
    if not chosen:
        raise ArtefactError(
            f"corpus {corpus.directory} has no documents in {', '.join(PARSERS)}: name another in stage.corpus"
        )

    with console.counting(f"sampling {loaded.name}", unit="samples", total=None) as count:
        for number, samples in sample(loaded, chosen, config, count.advance):
            beginning = chosen[number]
            name = f"generated:{loaded.name}:seed={config.seed}:{beginning.origin}"
            ranking = ranking_of_samples(beginning, samples)
            if ranking is None:
                yield Rejected(f"{source.language}_{beginning.language}", name, "no_ranking")
            else:
                yield ranking_document(ranking, f"{source.language}_{beginning.language}", name, source.licence)


def beginnings(corpus: TokenCorpus, tokenizer: Tokenizer, limit: int, seed: int) -> list[Beginning]:
    """Returns the first one to four lines (at most 200 characters) of `limit` documents at even distances.

    Only languages that have a parser count, and no excluded documents. Blank beginnings are left out, so there may be
    fewer.
    """
    codes = [code for code, name in enumerate(corpus.languages) if name in PARSERS]
    documents = [
        number
        for number in range(corpus.n_documents)
        if corpus.language_codes[number] in codes and number not in corpus.excluded
    ]
    chosen = []
    for index in evenly_spaced(len(documents), limit).tolist():
        number = documents[index]
        language = corpus.languages[corpus.language_codes[number]]

        # A token has about one character or more, so this number of tokens covers the beginning.
        end = min(int(corpus.lengths[number]), 1 + LONGEST_BEGINNING)
        head = tokenizer.decode(corpus.tokens(number, 1, end))
        n_lines = 1 + key(Shuffle.SAMPLE_LINES, seed, number) % MOST_LINES
        text = "".join(head.splitlines(keepends=True)[:n_lines])[:LONGEST_BEGINNING]
        if text.strip():
            chosen.append(Beginning(language, text, f"{corpus.directory.name}:{number}"))
    return chosen


def sample(
    loaded: LoadedModel, chosen: Sequence[Beginning], config: RankingsConfig, advance: Callable[[], None]
) -> Iterator[tuple[int, list[Sample]]]:
    """Yields (index in `chosen`, samples of this beginning), with rising indices.

    The number of samples differs between beginnings and follows from the seed (see `requests_of`); continuations come
    before answers. The samples are the same on all machines of one kind. A beginning is skipped if its prompt and the
    longest sample exceed the context of the model. All samples are generated before the first pair is yielded.

    Args:
        advance: called once for each sample, when it is complete.

    Raises:
        ArtefactError: the model's logits are not numbers.
        UserError: the tokenizer lacks the mark that ends a turn; ChatError, one of these, as `requests_of`.
    """
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    # One engine for all beginnings: their samples share its batches.
    engine = Engine(
        loaded.config,
        loaded.weights,
        eot_id=loaded.tokenizer.eot_id,
        options=EngineOptions(cache_tokens=max(CACHE_TOKENS, loaded.config.max_seq_len)),
        dtype=torch.float32,  # equal samples on all machines of a kind
        device=device,
    )

    answers_of: dict[int, list[Answer]] = {}
    for number, beginning in enumerate(chosen):
        requests = requests_of(number, beginning, config.stage.samples, config.seed, loaded.tokenizer)
        longest = max(len(request.prompt) + request.params.max_new_tokens for request in requests)
        # One refused request would end the run of the engine.
        if longest > loaded.config.max_seq_len:
            continue
        answers_of[number] = []
        for request in requests:
            engine.submit(request)

    for answer in only_answers(engine.results(), "stage.samples"):
        answers_of[int(answer.request.partition(":")[0])].append(answer)
        advance()

    # Answers arrive in any order; samples must not depend on it.
    for number, answers in answers_of.items():
        answers.sort(key=lambda answer: (answer.request, answer.index))
        yield number, [sample_of(answer, loaded.tokenizer) for answer in answers]


def requests_of(
    number: int, beginning: Beginning, settings: RankingSamplesConfig, seed: int, tokenizer: Tokenizer
) -> list[Request]:
    """Returns two requests for a beginning: continuations as text (`NUMBER:text`), and answers as a turn
    (`NUMBER:turn`).

    Together they ask for `fewest` to `most` samples, a number that follows from the seed; half of them each, an odd one
    as text.

    Args:
        number: number of the beginning; it and the seed determine all draws.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn.
        ChatError: a kept chat template cannot write the beginning as a turn.
    """
    random_word = key(Shuffle.SAMPLES, seed, number)
    total = settings.fewest + random_word % (settings.most - settings.fewest + 1)
    params = SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop_tokens=stop_tokens(tokenizer),
    )
    # Half as text, half as a turn: the policy of stage rlhf answers turns, but programs are learned as text.
    as_turn = prompt(Conversation((Message("user", beginning.text),)), tokenizer)
    as_text = tokenizer.encode_prompt(beginning.text)

    parts = (("text", as_text, (total + 1) // 2), ("turn", as_turn, total // 2))
    return [
        Request(f"{number}:{kind}", tokens, params, seed=key(random_word, i) % 2**31, n=n)
        for i, (kind, tokens, n) in enumerate(parts)
    ]


def sample_of(answer: Answer, tokenizer: Tokenizer) -> Sample:
    """Returns the text up to the first special token, which begins another turn or a call."""
    special = set(tokenizer.special_ids.values())
    end = next((index for index, token in enumerate(answer.tokens) if token in special), len(answer.tokens))
    return Sample(tokenizer.decode(answer.tokens[:end]), finished=answer.finish in ("eot", "stop"))


def ranking_of_samples(beginning: Beginning, samples: Sequence[Sample]) -> Ranking | None:
    """Returns the ranking of different, non-empty samples by quality; None if they all have the same quality."""
    # The same text twice would be a tie with itself.
    different = list({sample.text: sample for sample in samples if sample.text.strip()}.values())
    scores = []
    for candidate in different:
        parsed = bool(parses_continued(beginning.language, beginning.text, candidate.text, candidate.finished))
        scores.append(marks_of(beginning.text, candidate.text, parsed).quality)
    # Without two qualities there is no better and no worse sample.
    if len(set(scores)) < 2:
        return None
    return Ranking(
        prompt=Conversation((Message("user", beginning.text),)),
        completions=tuple(candidate.text for candidate in different),
        ranks=ranks_of_scores(scores),
    )
