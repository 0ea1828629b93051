"""Folders that transformers, TRL and peft save after our export come in again: equal logits, equal ids.

What these programs write differs from our export: `tokenizer.json` without `tokenizer.model`, other keys in
`tokenizer_config.json` and `config.json`, several files of weights, tied weights left out. A model that was imported in
spite of such a difference would answer with other numbers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm.chat.template import chat_template
from dist_lm.errors import ArtefactError
from dist_lm.generation.load import load_model
from dist_lm.interop.hf_tokenizer import save_hf_tokenizer
from dist_lm.interop.snapshot import tokenizer_of
from dist_lm.model.transformer import Transformer
from dist_lm.stages.exporting.files import export
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import VOCAB_SIZE
from tests.interop.hf_models import our_model, small
from tests.stages.test_export import saved
from tests.tokenizer.made_json import trained_json
from tests.tokenizer.stdlib_text import stdlib_texts
from tests.tokenizer.test_existing import their_sentencepiece
from tests.training_run import linked

transformers = pytest.importorskip("transformers")
SENTENCEPIECE = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TEXTS = ("def f(x):\n    return 'é漢😀'", "<|endoftext|> is text", "a  b\tc\n\n  d", "#!/usr/bin/env python\n")
HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    return linked(tiny_work, tmp_path / "work")


def exported(work: WorkDirectory, folder: Path, family: str = "Llama", tokenizer: str = "ours", **changes: Any) -> Path:
    """An export of a run that was imported, so that it has any family and tokenizer."""
    vocab_size = {"ours": VOCAB_SIZE, "sentencepiece": 1000, "byte-level": 400}[tokenizer]
    model = our_model(small(family, vocab_size=vocab_size, max_seq_len=256, **changes))
    first = saved(folder / "first", model, work)
    if tokenizer == "sentencepiece":
        (first / "tokenizer.model").write_bytes(their_sentencepiece(**SENTENCEPIECE))
    if tokenizer == "byte-level":
        (first / "tokenizer.json").write_bytes(trained_json(stdlib_texts()[:20], vocab_size - 3))
        (first / "tokenizer.model").unlink()
    run = import_model(str(first), "first", work)
    export(run.path, folder / "export", "fp32")
    return folder / "export"


def assert_same(work: WorkDirectory, folder: Path, name: str = "back") -> Tokenizer:
    """Imports what `folder` holds and compares logits and ids with those of transformers for the folder."""
    loaded = load_model(import_model(str(folder), name, work).path)
    ours = Transformer(loaded.config)
    ours.load_state_dict(loaded.weights)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    names = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = loaded.tokenizer.encode_prompt(text)
        expected = names(text, split_special_tokens=True).input_ids
        assert ids[len(ids) - len(expected) :] == expected
        tokens_BT = torch.tensor([ids])
        with torch.no_grad():
            logits, expected_logits = ours(tokens_BT), theirs(input_ids=tokens_BT).logits
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5 * float(expected_logits.abs().max()))
    return loaded.tokenizer


CASES = [
    ("Llama", "ours", {"tie_embeddings": True}),
    ("Llama", "sentencepiece", {}),
    ("Qwen3", "byte-level", {"tie_embeddings": True}),
    pytest.param("GPTNeoX", "ours", {}, marks=pytest.mark.bars),
    pytest.param("Pythia", "byte-level", {}, marks=pytest.mark.bars),
    pytest.param("Starcoder2", "ours", {"tie_embeddings": True}, marks=pytest.mark.bars),
    pytest.param("Arcee", "ours", {}, marks=pytest.mark.bars),
    pytest.param("Llama 3.1", "byte-level", {}, marks=pytest.mark.bars),
    pytest.param("Llama with biases", "sentencepiece", {"n_kv_heads": 1}, marks=pytest.mark.bars),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "tokenizer", "changes"), CASES, ids=str)
def test_what_transformers_saves_of_an_export_comes_back(
    family: str, tokenizer: str, changes: dict, work: WorkDirectory, tmp_path: Path
):
    folder, again = exported(work, tmp_path, family, tokenizer, **changes), tmp_path / "again"
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").save_pretrained(
        again, max_shard_size="50KB"
    )
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    assert len(list(again.glob("*.safetensors"))) > 1
    assert not (again / "tokenizer.model").exists()
    back = assert_same(work, again)
    before = load_model(work.run("import", "first").path).tokenizer
    assert back.special_ids == before.special_ids
    assert back.first_token == before.first_token
    assert (back.kept_template is None) == (before.kept_template is None)
    if tokenizer == "ours":
        assert back.sha256 == before.sha256  # its corpora and runs serve as before


def trained_by_trl(folder: Path, again: Path, rate: float, **options: Any) -> None:
    """One step of SFTTrainer on an export; `again` is what it saves."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    settings = trl.SFTConfig(
        output_dir=str(again),
        learning_rate=rate,
        **{"max_steps": 1, "lr_scheduler_type": "constant", "max_length": 64, "per_device_train_batch_size": 2},
        **{"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True},
    )
    rows = datasets.Dataset.from_list([{"messages": HELLO}] * 4)
    trainer = trl.SFTTrainer(model=str(folder), args=settings, train_dataset=rows, **options)
    trainer.train()
    trainer.save_model(str(again))


@pytest.mark.heavy
@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_what_trl_saves_comes_back(rate: float, work: WorkDirectory, tmp_path: Path):
    folder, again = exported(work, tmp_path, tie_embeddings=True), tmp_path / "again"
    trained_by_trl(folder, again, rate)
    assert_same(work, again)
    before, after = (load_model(work.run("import", name).path).weights for name in ("first", "back"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert bool(changed) == bool(rate)


@pytest.mark.heavy
def test_adapters_that_trl_saves_come_back(work: WorkDirectory, tmp_path: Path):
    """Their folder has a tokenizer of its own, and names the export as base. Merged by peft it is a whole model."""
    peft = pytest.importorskip("peft")
    folder, again = exported(work, tmp_path), tmp_path / "again"
    lora = peft.LoraConfig(r=2, use_rslora=True, target_modules="all-linear", lora_dropout=0.1)
    trained_by_trl(folder, again, 1e-1, peft_config=lora)
    back = assert_same(work, again)
    assert back.sha256 == load_model(work.run("import", "first").path).tokenizer.sha256

    merged = peft.AutoPeftModelForCausalLM.from_pretrained(again, dtype="float32").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(again).save_pretrained(tmp_path / "merged")
    assert_same(work, tmp_path / "merged", "merged")
    one, other = (load_model(work.run("import", name).path).weights for name in ("back", "merged"))
    first = load_model(work.run("import", "first").path).weights
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(first[name], value) for name, value in one.items())


@pytest.mark.heavy
def test_tokens_that_were_added_come_back_behind_ours(work: WorkDirectory, tmp_path: Path):
    folder, again = exported(work, tmp_path), tmp_path / "again"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    tokenizer.add_tokens(["longword"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    back = assert_same(work, again)
    assert back.vocab_size == VOCAB_SIZE + 2
    assert back.special_ids["<|think|>"] == VOCAB_SIZE
    assert VOCAB_SIZE not in back.encode("<|think|>")
    assert back.encode("a longword")[-1] == VOCAB_SIZE + 1
    assert back.decode(back.encode("a longword")) == "a longword"
    export(work.run("import", "back").path, tmp_path / "out", "fp32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a longword", add_special_tokens=False).input_ids == back.encode("a longword")
    assert theirs.convert_tokens_to_ids("<|think|>") == VOCAB_SIZE


# --- tokenizer.json as the only file of a SentencePiece model ---


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ["<mine>"]}], ids=str)
def test_ids_of_a_sentencepiece_model_come_back(options: dict, tmp_path: Path):
    """`LlamaTokenizer` writes other steps than the converter of `AutoTokenizer`."""
    path, folder = tmp_path / "tokenizer.model", tmp_path / "hf"
    path.write_bytes(their_sentencepiece(**SENTENCEPIECE, **options))
    save_hf_tokenizer(path, folder, chat_template())
    before = Tokenizer.load(path)
    for kind in ("AutoTokenizer", "LlamaTokenizer"):
        again = tmp_path / kind
        getattr(transformers, kind).from_pretrained(folder).save_pretrained(again)
        if kind == "LlamaTokenizer" and not options.get("add_dummy_prefix", True):
            continue  # it puts a space before every text, whatever the model says
        back = Tokenizer(*tokenizer_of(again, before.vocab_size))
        assert back.first_token == before.first_token
        assert back.special_ids.keys() >= before.special_ids.keys()
        for text in (*TEXTS, *stdlib_texts()[:50]):
            assert back.encode(text) == before.encode(text), kind


@pytest.fixture(scope="module")
def saved_json(tmp_path_factory: pytest.TempPathFactory, tiny_work: WorkDirectory) -> Path:
    """A folder with the tokenizer.json that transformers saves of ours."""
    folder = tmp_path_factory.mktemp("saved")
    save_hf_tokenizer(tiny_work.tokenizer_model, folder / "export", chat_template())
    transformers.AutoTokenizer.from_pretrained(folder / "export").save_pretrained(folder / "again")
    return folder / "again"


def parted(value: dict) -> None:
    """Moves one of the pairs that make the same piece."""
    merges = value["model"]["merges"]
    place = next(n for n in range(1, len(merges)) if "".join(merges[n]) == "".join(merges[n - 1]))
    merges.append(merges.pop(place))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda value: value["model"]["merges"].pop(0), "model.merges=no .* expected every pair that makes a piece"),
        (lambda value: value["model"]["merges"].append(["<tools>", "a"]), "model.merges=.* expected pairs that make a"),
        (parted, "model.merges=.* expected all pairs of a piece in a row"),
        (lambda value: value["model"]["vocab"].pop("<0x41>"), "model.vocab=639 ids: expected the ids 0, 1, 2"),
        (lambda value: value.update(normalizer={"type": "Lowercase"}), "gives other ids than this file"),
        (lambda value: value["added_tokens"].append({"id": 700}), "added_tokens=no token 640"),
        (lambda value: value["model"].update(merges=[5]), "not a tokenizer.json of SentencePiece"),
        (lambda value: value["model"].update(unk_token="nothing"), "model.unk_token=nothing: expected a piece"),
    ],
)
def test_a_file_that_sentencepiece_cannot_compute_is_refused(spoil: Any, words: str, saved_json: Path, tmp_path: Path):
    """Taken as a model all the same, it would give other ids than the model was trained on."""
    folder = tmp_path / "saved"
    shutil.copytree(saved_json, folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    spoil(value)
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(ArtefactError, match=words) as refused:
        tokenizer_of(folder, VOCAB_SIZE)
    assert str(folder / "tokenizer.json") in str(refused.value)
