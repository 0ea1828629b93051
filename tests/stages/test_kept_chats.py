"""An imported model keeps its chat template: in the import, the work directory, the corpora, generation and exports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.chat.documents import encode_document, write_conversation
from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.template import prompt, render
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, UserError
from dist_lm.generation.load import load_model
from dist_lm.generation.terminal import generate
from dist_lm.generation.tool_chat import ToolOptions
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.exporting.files import export
from dist_lm.stages.generate import parts as generate_parts
from dist_lm.stages.generate.stage import STAGE as GENERATE
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.stages.shards.identity import corpus_fingerprint, digest, recipe_of
from dist_lm.stages.tokenizer import STAGE as TOKENIZER
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import read_metrics
from dist_lm.training import checkpoint_files as files
from tests.chat.test_kept_template import ADDS_SYSTEM
from tests.conftest import VOCAB_SIZE
from tests.interop.hf_models import our_model, small
from tests.stages.test_export import saved
from tests.training_run import prepare, tolerance, train

transformers = pytest.importorskip("transformers")
SHAPE = (
    f"model.vocab_size={VOCAB_SIZE}",
    "model.d_model=40",
    "model.n_layers=2",
    "model.n_heads=5",
    "model.d_ff=80",
    "model.max_seq_len=256",
)
CHAT = Conversation((Message("user", "Say <|im_end|>"), Message("assistant", "No.")))


@pytest.fixture
def snapshot(tiny_work: WorkDirectory, tmp_path: Path) -> Path:
    """A Llama of transformers whose chat template adds a turn of the system."""
    config = small("Llama", d_model=40, d_ff=80, max_seq_len=256, vocab_size=VOCAB_SIZE, rope_base=500.0)
    folder = saved(tmp_path / "Llama-chat", our_model(config), tiny_work)
    special = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": ADDS_SYSTEM}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.mark.heavy
def test_the_template_travels_from_the_snapshot_to_the_export(snapshot: Path, tmp_path: Path):
    work = WorkDirectory(tmp_path / "work")
    run = import_model(str(snapshot), "mine", work)
    kept = load_model(run.path).tokenizer.kept_template
    assert kept
    assert (kept.text, dict(kept.special_tokens)) == (
        ADDS_SYSTEM,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    )
    for number, source in enumerate((str(run.path / "tokenizer"), f"hf:{snapshot}")):
        own = WorkDirectory(tmp_path / f"work{number}")
        given = ["stage=shards", f"tokenizer={source}", f"work_dir={own.path}", "corpus.corpora={}"]
        config = compose_config(given)
        TOKENIZER.build(config, Console())
        assert TOKENIZER.inspect(config).ready
        assert KeptTemplate.read(own.tokenizer) == kept
        with pytest.raises(ArtefactError, match="layout of conversations is that of an imported model"):
            TOKENIZER.inspect(compose_config([*given, "tokenizer.chat_template=ours"]))
    export(run.path, tmp_path / "out", "fp32")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == ADDS_SYSTEM
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    plain = [{"role": "user", "content": "Say no."}]
    expected = theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
    asked = Conversation((Message("user", "Say no."),))
    assert prompt(asked, load_model(run.path).tokenizer) == expected
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ids["eos_token_id"] == [0, theirs.convert_tokens_to_ids("<|im_end|>")]
    assert ids["bos_token_id"] == theirs.convert_tokens_to_ids("<|im_start|>")
    again = import_model(str(tmp_path / "out"), "again", work)
    back = load_model(again.path).tokenizer.kept_template
    assert back
    assert back.text == ADDS_SYSTEM


def test_corpora_of_another_layout_are_not_used(snapshot: Path, tiny_work: WorkDirectory, tmp_path: Path):
    work = WorkDirectory(tmp_path / "work")
    shutil.copytree(tiny_work.path, work.path)
    config = compose_config(["stage=shards", f"work_dir={work.path}"])
    before = {name: digest(corpus_fingerprint(config, name)) for name in ("code", "tools")}
    KeptTemplate(ADDS_SYSTEM, (), "2026-01-31").write(work.tokenizer)
    after = {name: digest(corpus_fingerprint(config, name)) for name in ("code", "tools")}
    assert before["code"] == after["code"]
    assert before["tools"] != after["tools"]
    tokenizer = Tokenizer.load(work.tokenizer_model)
    plain = replace(config.tokenizer, source="keep")
    assert TOKENIZER.inspect(replace(config, tokenizer=plain)).ready
    assert tokenizer.decode(render(CHAT, tokenizer).tokens).startswith("system\nYou help.")


@pytest.mark.heavy
def test_a_template_of_our_own_layout_is_not_kept(snapshot: Path, tiny_work: WorkDirectory, tmp_path: Path):
    from dist_lm.chat.template import chat_template

    (snapshot / "tokenizer_config.json").unlink()
    (snapshot / "chat_template.jinja").write_text(chat_template())
    run = import_model(str(snapshot), "mine", WorkDirectory(tmp_path / "work"))
    assert load_model(run.path).tokenizer.kept_template is None
    assert run.chat_template.read_text() == chat_template()
    (snapshot / "chat_template.jinja").write_text("{% broken")
    broken = import_model(str(snapshot), "broken", WorkDirectory(tmp_path / "work"))
    with pytest.raises(ChatError, match="cannot be read"):
        prompt(Conversation(CHAT.messages[:1]), load_model(broken.path).tokenizer)


@pytest.mark.heavy
def test_chats_are_answered_in_the_kept_layout(snapshot: Path, tmp_path: Path):
    """`stage=generate stage.chat=true` and `dist-lm generate --chat`; --tools needs calls that can be read."""
    run = import_model(str(snapshot), "mine", WorkDirectory(tmp_path / "work"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say <|im_end|>\n")
    checkpoint = files.find_checkpoint(run.path)
    given = (f"work_dir={tmp_path / 'work'}", f"stage.prompts={prompts}", f"stage.checkpoint={checkpoint}")
    config = compose_config(["stage=generate", *given, "stage.chat=true", *SHAPE])
    tokenizer = GENERATE.tokenizer(config)
    (tmp_path / "run").mkdir()
    (request,) = generate_parts.Samples(config, RunDirectory(tmp_path / "run"), tokenizer).requests()
    assert request.prompt == prompt(Conversation((Message("user", "Say <|im_end|>"),)), tokenizer)
    assert request.params.stop_tokens == (tokenizer.special_ids_in_file["<|im_end|>"],)
    functions = tmp_path / "functions.py"
    functions.write_text("def one() -> int:\n    'One.'\n    return 1\n")
    values = {"max_new_tokens": 4, "temperature": 0}
    chat = ToolOptions(None)
    assert generate(run.path, "Hello", None, values, [], 0, 1, "cpu", tools=chat) in (0, 1)
    with pytest.raises(UserError, match=r"--tools: the chat template .* <tool_call>JSON"):
        generate(run.path, "Hello", None, values, [], 0, 1, "cpu", tools=ToolOptions(functions))


@pytest.mark.cluster
@pytest.mark.bars
def test_stage_tools_learns_answers_of_the_kept_layout_at_any_layout(tiny_work: WorkDirectory, tmp_path: Path):
    """Answers alone are learned, at one rank as with tp 2."""
    work = WorkDirectory(tmp_path / "work")
    shutil.copytree(tiny_work.path, work.path)
    KeptTemplate(ADDS_SYSTEM, (), "2026-01-31").write(work.tokenizer)
    config = compose_config(["stage=tools", f"work_dir={work.path}"])
    shutil.rmtree(work.corpus("tools"))
    tokenizer, learned = Tokenizer.load(work.tokenizer_model), 0
    with CorpusWriter(work.corpus("tools"), recipe_of(config, "tools")) as writer:
        for number in range(60):
            chat = Conversation((Message("user", f"Count {number}"), Message("assistant", f"{number} {number}")))
            text = write_conversation(chat)
            document = Document(text, "chat", f"chat:{number}", "none", f"{number:064x}", form="conversation")
            encoded = encode_document(tokenizer, document)
            learned += int(encoded.loss_mask.sum()) if encoded.loss_mask is not None else 0
            writer.write("val" if number % 10 == 0 else "train", encoded)
        writer.finish({}, [])
    assert learned == sum(len(tokenizer.encode(f"{n} {n}")) + 1 for n in range(60))
    losses = []
    for run_id, ranks, *more in (("one", 1), ("cut", 2, "parallel.tp=2")):
        own = ("stage.steps=3", "stage.warmup_steps=1", "stage.checkpoint_every=3", "stage.eval_every=3")
        own = (*own, "parallel.compute_dtype=fp32")  # layouts are compared
        run = prepare(work, run_id, *own, "stage.init_from=none", "stage.mix=null", *more, stage="tools")
        train(run, ranks)
        losses.append([line["train/loss"] for line in read_metrics(run.metrics) if "train/loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=tolerance("train/loss"))
