"""SmolLM2-135M-Instruct beside transformers: ids, chats and greedy text. SMOLLM2_SNAPSHOT is a folder of its files."""

import os
from itertools import islice

import hypothesis
import pytest
import torch
from hypothesis import strategies

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.template import prompt, render, stop_tokens
from dist_lm.data.in_turn import read_in_turn
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.generation.session import build_engine
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.storage.run_directory import WorkDirectory
from tests.chat.test_kept_template import plain_chats

transformers = pytest.importorskip("transformers")
SNAPSHOT = os.environ.get("SMOLLM2_SNAPSHOT", "")
pytestmark = [
    pytest.mark.bars,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not SNAPSHOT, reason="SMOLLM2_SNAPSHOT names no folder"),
]
STRINGS, CHATS, ASKED, NEW_TOKENS = 100_000, 200, 20, 200
CLOSE = 1e-3  # between the two largest logits: rounding may choose either
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "List three uses of a paperclip.",
    "How do I boil an egg?",
    "Write a Python function that reverses a string.",
    "What is 12 times 8?",
    "Tell me a short story about a fox.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "What does HTTP stand for?",
    "Describe a sunset.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What are prime numbers?",
    "Summarise the water cycle.",
    "How does a bicycle stay upright?",
    "Name five animals that live in the desert.",
    "What is a linked list?",
    "Give advice for learning to play the guitar.",
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    work = WorkDirectory(tmp_path_factory.mktemp("smollm2") / "work")
    return load_model(import_model(SNAPSHOT, "smol", work).path)


def theirs():
    """`tokenizer.json` as it is. Version 5 of transformers leaves out the pre-tokenizer of a folder that names
    GPT2Tokenizer, as SmolLM2's does: digits are then split too late, and seven of 200 chats differ."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(SNAPSHOT, local_files_only=True)


def test_ids_of_the_local_corpus_and_of_any_string(loaded: LoadedModel):
    tokenizer, other = loaded.tokenizer, theirs()

    def same(text: str) -> None:
        expected = other(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.encode(text) == expected, text[:200]

    config = compose_config(["stage=shards"])
    documents = 0
    for document in read_in_turn(config.corpus, config.seed, 10**12):
        same(document.text)
        documents += 1
    print(f"\n{documents:,} documents of the local corpus: ids of transformers")
    pieces = strategies.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<repo_name>", "\n\n", "    ", "123"]
    )
    strings = strategies.one_of(strategies.text(), strategies.lists(strategies.text(max_size=8) | pieces).map("".join))
    count = 0

    @hypothesis.settings(
        max_examples=STRINGS,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strings)
    def any_string(text: str) -> None:
        nonlocal count
        same(text)
        count += 1

    any_string()
    assert count >= STRINGS
    print(f"{count:,} strings of hypothesis: ids of transformers")


def test_chats_have_the_ids_of_transformers(loaded: LoadedModel):
    other, tokens, learned = theirs(), 0, 0
    for conversation in plain_chats(CHATS):
        messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
        rendered = render(conversation, loaded.tokenizer)
        assert rendered.tokens.tolist() == other.apply_chat_template(messages, tokenize=True, return_dict=False)
        asked = other.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert prompt(Conversation(conversation.messages[:-1]), loaded.tokenizer) == asked
        tokens, learned = tokens + len(rendered.tokens), learned + int(rendered.loss_mask.sum())
    print(f"\n{CHATS} chats, {tokens:,} tokens, {learned:,} of them learned: ids of transformers")


def test_greedy_text_is_that_of_transformers(loaded: LoadedModel):
    chats = [Conversation((Message("user", text),)) for text in QUESTIONS[:ASKED]]
    prompts = [prompt(chat, loaded.tokenizer) for chat in chats]
    ends = stop_tokens(loaded.tokenizer)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, stop_tokens=ends)
    engine = build_engine(loaded, torch.device("cpu"), ASKED)
    for number, tokens in enumerate(prompts):
        engine.submit(Request(str(number), tokens, params))
    ours: dict[int, list[int]] = {}
    while engine.busy:
        for done in engine.step():
            assert isinstance(done, Answer)
            ours[int(done.request)] = done.tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(SNAPSHOT, dtype=torch.float32, local_files_only=True)
    compared, equal, parted = 0, 0, []
    for number, tokens in islice(enumerate(prompts), ASKED):
        out = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[loaded.tokenizer.eot_id, *ends],
            pad_token_id=loaded.tokenizer.pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = out.sequences[0, len(tokens) :].tolist()
        found = ours[number]
        place = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        compared += len(expected) if place is None else place
        if place is None:
            assert len(found) == len(expected)
            equal += 1
            continue
        first, second = out.logits[place][0].topk(2).values.tolist()
        assert first - second < CLOSE, (QUESTIONS[number], place, first - second)
        parted.append((place, first - second))
    print(f"\n{equal} of {ASKED} texts equal, {compared:,} tokens compared; parted at near ties: {parted}")
