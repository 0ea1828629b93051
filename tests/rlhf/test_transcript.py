"""Conversations by ids: no id changes between turns, and masks are exactly what the model drew, over all templates."""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.template import answer_tokens, prompt, stop_tokens
from dist_lm.rlhf.transcript import Transcript
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer
from tests.chat.conversations import hostile_conversation
from tests.chat.layouts.read_rows import byte_tokenizer
from tests.chat.test_kept_template import ADDS_SYSTEM, HERMES, TRIMS, WITHOUT_HEADER, file, ours_with
from tests.chat.test_thinking import DROPS, KEEPS, PLAIN, TAKES_OUT

hf = pytest.importorskip("tokenizers")

__all__ = ["file"]
# names of special tokens as templates of published models write them
SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|?>|<｜[^｜]+｜>|</?[a-z_]*(?:turn|bos|eos)[a-z_]*>|<[a-z_]*_of_[a-z]+>|\[/?[A-Z_]{3,}\]"
)
N_OF_TRL = 20  # conversations of each template
BY_BYTES = {"keeps": KEEPS, "drops": DROPS, "plain": PLAIN, "takes_out": TAKES_OUT}
BY_MERGES = {"adds_system": ADDS_SYSTEM, "trims": TRIMS, "without_header": WITHOUT_HEADER, "hermes": HERMES}
NAMES = ("ours", *BY_BYTES, *BY_MERGES)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, file: Path) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("bytes")
    by_bytes = {name: byte_tokenizer(folder, template) for name, template in BY_BYTES.items()}
    by_merges = {name: ours_with(file, template) for name, template in BY_MERGES.items()}
    return {"ours": byte_tokenizer(folder)} | by_bytes | by_merges


def drawn_as(message: Message, transcript: Transcript, tokenizer: Tokenizer, random: Random) -> list[int]:
    """Returns a turn as a model may draw it: text in other tokens than the tokenizer's, the end missing or another."""
    ids = answer_tokens(message, tokenizer, transcript.conversation)
    special = {*tokenizer.special_ids.values(), *stop_tokens(tokenizer), tokenizer.eot_id}
    if random.random() < 0.5:
        drifted: list[int] = []
        for token in ids:
            text = tokenizer.decode([token])
            if token in special or not text.isascii() or tokenizer.decode(tokenizer.encode(text)) != text:
                drifted.append(token)
            else:
                drifted += [part for character in text for part in tokenizer.encode(character)]
        ids = drifted

    end = random.random()
    if end < 0.1 and len(ids) > 1:
        return ids[:-1]
    if end < 0.2:
        return [*ids[:-1], tokenizer.eot_id]
    return ids


def runs_of(drawn: Sequence[bool]) -> list[tuple[int, int]]:
    """Returns (begin, end) of each run of drawn tokens."""
    edges = [i for i in range(len(drawn) + 1) if (i < len(drawn) and drawn[i]) != (i > 0 and drawn[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def turns_between(conversation: Conversation) -> list[tuple[list[Message], Message]]:
    """Returns the turns before each turn of the assistant, and that turn."""
    pairs: list[tuple[list[Message], Message]] = []
    before: list[Message] = []
    for message in conversation.messages:
        if message.role == "assistant":
            pairs.append((before, message))
            before = []
        else:
            before.append(message)
    return [*pairs, (before, Message("assistant", "The last one."))] if before else pairs


def check(conversation: Conversation, tokenizer: Tokenizer, random: Random) -> Transcript | None:
    """Grows a transcript turn by turn; None: the template refuses the conversation."""
    (opening, answer), *others = turns_between(conversation)
    try:
        transcript = Transcript(Conversation(tuple(opening), conversation.tools), tokenizer)
    except ChatError:
        return None

    all_drawn: list[list[int]] = []
    for observation, next_answer in [*others, ([], None)]:
        # An unreadable turn calls nothing, so no result can follow.
        try:
            ids = drawn_as(answer, transcript, tokenizer, random)
        except ChatError:
            return transcript if all_drawn else None
        before_turn = [(list(sample.ids), list(sample.drawn)) for sample in transcript.samples]
        conversation_before = transcript.conversation
        transcript.add_turn(ids)
        all_drawn.append(ids)
        assert_grown(before_turn, transcript)
        assert_masks(all_drawn, transcript)
        if next_answer is None:
            return transcript

        before = [(list(sample.ids), list(sample.drawn)) for sample in transcript.samples]
        try:
            transcript.add_observation(observation)
        except ChatError:
            assert before == [(sample.ids, sample.drawn) for sample in transcript.samples]
            return transcript
        assert_grown(before, transcript)
        assert_masks(all_drawn, transcript)
        assert conversation_before.messages == transcript.conversation.messages[: len(conversation_before.messages)]

        # What the model reads, with its turns in the template's tokens, is the template's prompt.
        assert templated(transcript, tokenizer) == prompt(transcript.conversation, tokenizer)
        answer = next_answer
    return transcript


def assert_grown(before: list[tuple[list[int], list[bool]]], transcript: Transcript) -> None:
    for (ids, drawn), sample in zip(before, transcript.samples, strict=False):
        assert sample.ids[: len(ids)] == ids
        assert sample.drawn[: len(drawn)] == drawn
    for (ids, _), sample in zip(before[:-1], transcript.samples, strict=False):
        assert len(sample.ids) == len(ids), "a sample grows after another one has begun"


def assert_masks(all_drawn: list[list[int]], transcript: Transcript) -> None:
    spans = [sample.ids[begin:end] for sample in transcript.samples for begin, end in runs_of(sample.drawn)]
    assert spans == all_drawn
    assert all(len(sample.ids) == len(sample.drawn) for sample in transcript.samples)


def templated(transcript: Transcript, tokenizer: Tokenizer) -> list[int]:
    """Returns the last sample with each turn of the model as the template tokenizes its message."""
    messages = transcript.conversation.messages
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    sample = transcript.samples[-1]
    runs = runs_of(sample.drawn)
    ids, ends, place = [], stop_tokens(tokenizer), 0
    for (begin, end), index in zip(runs, answers[len(answers) - len(runs) :], strict=True):
        before = replace(transcript.conversation, messages=messages[:index])
        canonical = answer_tokens(messages[index], tokenizer, before)
        if sample.ids[end - 1] not in ends:
            canonical = canonical[:-1]  # the end follows, and was not drawn
        ids += [*sample.ids[place:begin], *canonical]
        place = end
    return [*ids, *sample.ids[place:]]


def conversation_for(name: str, random: Random) -> Conversation:
    """Returns a conversation that the template can write."""
    conversation = hostile_conversation(random)
    if name in ("ours", "hermes"):
        return conversation
    # These write neither tools nor results, and some no system turn.
    messages = [message for message in conversation.messages if message.role in ("user", "assistant")]
    plain: list[Message] = []
    for message in messages:
        if plain and plain[-1].role == message.role:
            continue
        text = message.content.strip() or "text"
        thinks = name in ("keeps", "drops", "takes_out") and random.random() < 0.5
        plain.append(Message(message.role, text, thinking="A thought." * (thinks and message.role == "assistant")))
    return Conversation(tuple(plain))


def check_many(tokenizers: dict[str, Tokenizer], name: str, seeds: range) -> tuple[int, int]:
    """Returns how many conversations were checked, and how many of these had a broken prefix."""
    n_checked = n_broken = 0
    for seed in seeds:
        random = Random(f"{name} {seed}")
        transcript = check(conversation_for(name, random), tokenizers[name], random)
        n_checked += transcript is not None
        n_broken += transcript is not None and len(transcript.samples) > 1
    return n_checked, n_broken


@pytest.mark.parametrize("name", NAMES)
def test_no_id_changes_between_turns_and_masks_are_exact(name, tokenizers):
    """Finds text that is tokenized twice, a mask that slips, and prompts that differ from the template's."""
    n_checked, n_broken = check_many(tokenizers, name, range(34))
    assert n_checked >= 17
    assert (n_broken > 0) == (name == "drops"), "only the template that strips thinking breaks prefixes"


def trl_templates() -> dict[str, str]:
    """The chat templates of the package trl by name; empty if it is not installed. The package is not imported."""
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).rglob("*.jinja")) if folders else []
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def with_template(template: str, folder: Path) -> Tokenizer:
    """Returns a byte-level tokenizer with the special tokens that a template writes."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    made = hf.Tokenizer(hf.models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hf.decoders.ByteLevel()
    names = dict.fromkeys(["<|endoftext|>", "<s>", "</s>", *SPECIAL.findall(template)])
    made.add_special_tokens([hf.AddedToken(name, special=True, normalized=False) for name in names])
    path = folder / "tokenizer.json"
    made.save(str(path))
    ends = (("bos_token", "<s>"), ("eos_token", "</s>"))
    return Tokenizer(path.read_bytes(), str(path), KeptTemplate(template, ends, "2026-01-31"))


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_that_begins_anew_is_a_sample_of_its_own(name, tokenizers):
    """Finds ids of earlier samples that change, turns of the program that count as drawn, and an opening that is
    refused and leaves half a sample."""
    random, tokenizer = Random(f"anew {name}"), tokenizers[name]
    asked = Message("user", "Go on.")
    transcript = Transcript(Conversation((Message("user", "Begin."),)), tokenizer)
    all_drawn: list[list[int]] = []
    for summary in ("Nothing yet.", "One turn.", "Two turns."):
        for _ in range(2):
            ids = drawn_as(Message("assistant", "An answer."), transcript, tokenizer, random)
            transcript.add_turn(ids)
            all_drawn.append(ids)
            transcript.add_observation((asked,))
        before = [(list(sample.ids), list(sample.drawn)) for sample in transcript.samples]
        with pytest.raises(ChatError):
            transcript.begin_sample(Conversation((asked, Message("assistant", "I am asked nothing."))))
        assert before == [(sample.ids, sample.drawn) for sample in transcript.samples]

        opening = Conversation((Message("user", summary), Message("assistant", "Well."), asked))
        transcript.begin_sample(opening)
        assert before == [(sample.ids, sample.drawn) for sample in transcript.samples[:-1]]
        assert transcript.prompt == prompt(opening, tokenizer)
        assert transcript.conversation == opening
        assert_masks(all_drawn, transcript)


@pytest.mark.heavy
@pytest.mark.skipif(not trl_templates(), reason="trl is not installed")
def test_no_id_changes_in_templates_of_trl(tmp_path):
    """As the test above, over the templates of published models; one that cannot write a chat is passed over."""
    counts = {}
    for name, template in trl_templates().items():
        made = {name: with_template(template, tmp_path)}
        try:
            counts[name] = check_many(made, name, range(N_OF_TRL))
        except ChatError as error:
            counts[name] = str(error)
    print(counts)
    assert sum(count[0] >= N_OF_TRL // 4 for count in counts.values() if isinstance(count, tuple)) >= 20


@pytest.mark.bars
@pytest.mark.parametrize("name", NAMES)
def test_no_id_changes_in_a_hundred_thousand_conversations(name, tokenizers):
    """As the test above, for 100,000 conversations of all templates together."""
    n_checked, _ = check_many(tokenizers, name, range(100_000 // len(NAMES) + 1))
    assert n_checked > 1000
