"""Losses and gradients of stage sft are those of TRL's SFTTrainer on the same ids and masks, and where the two make
other ids and masks of the same messages, `DIFFERENCES` says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm.chat.documents import samples
from dist_lm.chat.jinja_text import messages_of, tools_of
from dist_lm.chat.messages import Call, ChatError, Conversation, Message, Tool
from dist_lm.chat.template import render
from dist_lm.data.batch import Batch
from dist_lm.interop.weights import converted
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.mesh import World
from dist_lm.stages.registry import stage_named
from dist_lm.stages.text import open_stream
from dist_lm.stages.training.arguments import DataArguments
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer
from dist_lm.training.step import accumulate_gradients
from tests.conftest import VOCAB_SIZE, composed, tiny
from tests.interop.hf_models import architecture, our_model, small, their_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
NEAR = 1e-5
IGNORED = -100  # the label of a token without loss


def packed_rows(batch: Batch) -> list[dict[str, Any]]:
    """The rows of a batch in the columns of a packed data set of TRL: a document is its inputs and its last target."""
    rows = []
    for row in range(len(batch.tokens_BT)):
        ids, labels, lengths = [], [], []
        documents = batch.document_BT[row]
        for document in documents.unique_consecutive().tolist():
            index = (documents == document).nonzero().flatten()
            mask = batch.loss_mask_BT[row, index]
            targets = batch.targets_BT[row, index]
            # Padding and documents without an answer have no loss.
            if not mask.any():
                continue
            ids += [*batch.tokens_BT[row, index].tolist(), int(targets[-1])]
            labels += [IGNORED, *torch.where(mask > 0, targets, IGNORED).tolist()]
            lengths.append(len(index) + 1)
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return rows


def step_of_trl(model: Any, rows: list[dict[str, Any]], micro_batch: int, folder: Path) -> tuple[float, dict]:
    """Loss and gradients of the first optimizer step of SFTTrainer over all rows."""
    from trl import SFTConfig, SFTTrainer

    gradients: dict[str, torch.Tensor] = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **arguments: Any) -> None:
            gradients.update(
                {n: p.grad.clone() for n, p in arguments["model"].named_parameters() if p.grad is not None}
            )

    settings = SFTConfig(
        output_dir=str(folder),
        max_length=None,
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(rows) // micro_batch,
        max_steps=1,
        max_grad_norm=0,
        learning_rate=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        disable_tqdm=True,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=blank_tokenizer(), eos_token="<eos>", pad_token="<pad>"
    )
    data = datasets.Dataset.from_list(rows)
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[Keep()])
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients


def blank_tokenizer() -> Any:
    """The trainer asks for a tokenizer, and tokenises nothing with it."""
    import tokenizers

    words = {"<pad>": 0, "<eos>": 1}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["Llama", pytest.param("Qwen3", marks=pytest.mark.bars)])
def test_losses_and_gradients(family: str, tiny_work: WorkDirectory, tmp_path: Path):
    """Finds loss on other tokens than answers, attention across documents, positions that do not begin anew, and a mean
    over micro-batches in place of one over all answers."""
    ours = our_model(small(family, vocab_size=VOCAB_SIZE, max_seq_len=256, init_std=0.1))
    keys = ("stage.seq_len=96", "stage.global_batch=4", "stage.micro_batch=2", "stage.init_from=none")
    config = composed(["stage=sft", *tiny("sft"), *keys, f"work_dir={tiny_work.path}"])
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    run = RunDirectory(tiny_work.path / "runs" / "sft" / "trl")
    arguments: Any = DataArguments(config, run, world, tokenizer, None, 0, 1, 0)  # type: ignore[arg-type]
    with open_stream(arguments) as stream:
        batches = next(iter(stream)).micro_batches
    assert len(batches) == 2
    assert max(int(batch.document_BT.max()) for batch in batches) >= 2  # rows hold several documents

    rows = [row for batch in batches for row in packed_rows(batch)]
    loss, gradients = step_of_trl(their_model(ours), rows, 2, tmp_path)

    sums = accumulate_gradients(ours, stage_named("sft").objective(config), batches)
    total, count = sums.total_and_count.tolist()
    assert count == sum(label != IGNORED for row in rows for label in row["labels"])
    assert total / count == pytest.approx(loss, rel=NEAR)
    found = dict(ours.named_parameters())
    for conversion in converted(architecture(ours.config), parameter_shapes(ours.config)):
        for place, name in enumerate(conversion.ours):
            gradient = found[name].grad
            assert gradient is not None
            expected = conversion.to_ours(gradients[conversion.name], place)
            difference = float((gradient / count - expected).abs().max())
            assert difference <= NEAR * float(expected.abs().max()), name


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>")
SPECIAL += ("<|end_header_id|>", "<|eot_id|>", "<think>", "</think>")
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen2's
TEMPLATES = {"qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>"}  # file of trl -> end of a turn

ADD = Tool("add", "Adds.", {"type": "object", "properties": {"x": {"type": "integer"}}})
HELLO, AND, MORE = Message("user", "Hi"), Message("user", "And?"), Message("assistant", "More")
CHATS = {
    "one turn": Conversation((HELLO, Message("assistant", "Hello there"))),
    "system": Conversation((Message("system", "Be brief."), HELLO, Message("assistant", "Hello"))),
    "several turns": Conversation((HELLO, Message("assistant", "Hello"), AND, MORE)),
    "white space": Conversation((Message("user", " Hi\n"), Message("assistant", "Hello \n"))),
    "spelled mark": Conversation((Message("user", "Say <|im_end|>"), Message("assistant", "No"))),
    "thinking": Conversation((HELLO, Message("assistant", "Hello", thinking="Hm"))),
    "earlier thinking": Conversation(
        (HELLO, Message("assistant", "Hello", thinking="Hm"), AND, Message("assistant", "More", thinking="So"))
    ),
    "without loss": Conversation((HELLO, Message("assistant", "Hello", learn=False), AND, MORE)),
    "call": Conversation(
        (HELLO, Message("assistant", calls=(Call("add", {"x": 1}),)), Message("tool", results=(2,)), MORE), (ADD,)
    ),
}

LINES, MASK, IDS, SAMPLES, REFUSED = "line breaks", "mask", "ids", "samples", "refused"
AROUND = (
    "TRL also learns line breaks of the template around an answer: here the first ends the prompt, the last is behind"
)
SPELLED = "a mark that a text spells stays text here; a tokenizer of transformers makes the mark of it"
NOT_SHOWN = "the template shows no reasoning_content, so TRL drops it; here thinking stands in the text of the answer"
EARLIER = (
    "the template drops earlier thinking: here each answer is a sample of its own, as the model is asked later; TRL "
)
EARLIER += "trains with a template of its own that keeps it"
EMPTY = "TRL's template for training writes empty thinking before every answer, that of the model before the last one"
NO_SWITCH = "TRL has no switch for a turn, and learns the answer"
NO_TOOLS = "the template shows no tools: refused here by name, dropped by TRL without a word"
DIFFERENCES = {
    "qwen2_5": {
        **dict.fromkeys(("one turn", "system", "several turns", "white space", "call"), (LINES, AROUND)),
        "spelled mark": (IDS, SPELLED),
        "thinking": (IDS, NOT_SHOWN),
        "earlier thinking": (IDS, NOT_SHOWN),
        "without loss": (MASK, NO_SWITCH),
    },
    "qwen3": {
        **dict.fromkeys(("one turn", "system", "white space", "thinking"), (LINES, AROUND)),
        **dict.fromkeys(("several turns", "without loss", "call"), (IDS, EMPTY)),
        "spelled mark": (IDS, SPELLED),
        "earlier thinking": (SAMPLES, EARLIER),
    },
    "llama3": {
        "spelled mark": (IDS, SPELLED),
        "thinking": (IDS, NOT_SHOWN),
        "earlier thinking": (IDS, NOT_SHOWN),
        "without loss": (MASK, NO_SWITCH),
        "call": (REFUSED, NO_TOOLS),
    },
}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with the marks of the templates, which splits text as Qwen2's does."""
    import tokenizers

    pieces = {text: number for number, text in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, as_bytes])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    path = tmp_path_factory.mktemp("trl") / "tokenizer.json"
    made.save(str(path))
    return path


def prepared_by_trl(file: Path, template: str, end: str, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and masks that SFTTrainer makes of all conversations, with loss on answers alone."""
    from trl import SFTConfig, SFTTrainer

    rows = []
    for chat in CHATS.values():
        tools = json.dumps(tools_of(chat.tools)) if chat.tools else None
        rows.append({"messages": messages_of(chat.messages), "tools": tools})
    settings = SFTConfig(
        output_dir=str(folder), max_length=None, assistant_only_loss=True, report_to=[], use_cpu=True, bf16=False
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=SPECIAL[0], eos_token=end, pad_token=SPECIAL[0], chat_template=template
    )
    model = their_model(our_model(small("Llama", vocab_size=len(tokenizer))))
    trainer = SFTTrainer(model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], [int(label != IGNORED) for label in row["labels"]]) for row in trainer.train_dataset]


def difference(chat: Conversation, tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    """What differs between our ids and masks of a conversation and these; empty: nothing."""
    try:
        rendered, *more = (render(sample, tokenizer) for sample in samples(chat, tokenizer))
    except ChatError:
        return REFUSED
    if more:
        return SAMPLES
    if rendered.tokens.tolist() != ids:
        return IDS
    own_mask = rendered.loss_mask.tolist()
    line_break = tokenizer.encode("\n")[0]
    others = [index for index, (ours, theirs) in enumerate(zip(own_mask, mask, strict=True)) if ours != theirs]
    if not others:
        return ""
    return LINES if all(ids[index] == line_break and mask[index] for index in others) else MASK


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_of_messages_differ_for_the_reasons_given(name: str, tokenizer_file: Path, tmp_path: Path):
    """Finds an answer whose first or last token is not learned, and an instruction that is."""
    import trl

    end = TEMPLATES[name]
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    kept = KeptTemplate(template, (("bos_token", SPECIAL[0]), ("eos_token", end)), "2026-01-31")
    ours = Tokenizer(tokenizer_file.read_bytes(), str(tokenizer_file), kept)
    theirs = prepared_by_trl(tokenizer_file, template, end, tmp_path)
    found = {case: difference(CHATS[case], ours, *prepared) for case, prepared in zip(CHATS, theirs, strict=True)}
    assert {case: what for case, what in found.items() if what} == {
        case: what for case, (what, _) in DIFFERENCES[name].items()
    }
