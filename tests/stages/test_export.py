"""`dist-lm export` and `import`: folders that transformers loads, and models of transformers as runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_lm.chat.template import chat_template
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import save_config
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.load import load_model, model_config_of
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.exporting import files as exporting
from dist_lm.stages.exporting.files import export, write_model
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights, tensors_in
from tests.conftest import TINY, VOCAB_SIZE
from tests.interop.hf_models import FAMILIES, FURTHER, SCORED, our_model, small, tokens_for
from tests.patience import patient
from tests.tokenizer.made_json import trained_json
from tests.training_run import linked, write_untrained

transformers = pytest.importorskip("transformers")
IDS = {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": 0}


def saved(folder: Path, model: Transformer, tiny_work: WorkDirectory, dtype: str = "fp32") -> Path:
    """A folder as transformers wants it, with the tokenizer of the tests."""
    folder.mkdir(parents=True)
    write_model(folder, model.config, model.state_dict().__getitem__, dtype, IDS)
    shutil.copyfile(tiny_work.tokenizer_model, folder / "tokenizer.model")
    return folder


def untrained(work: WorkDirectory) -> RunDirectory:
    """The run code/default, with an untrained model."""
    run = write_untrained(work, "code", seed=0)
    save_config(compose_config(["stage=code", *TINY, f"work_dir={work.path}"]), run.config)
    return run


def of_tests(family: str, **changes: Any) -> ModelConfig:
    return small(family, vocab_size=VOCAB_SIZE, **changes)


def read_all(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors of all files: dtype, shape, bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: (one.dtype, one.shape, one.read().tobytes()) for name, one in tensors_in(file).items()}
    return found


def config_changed(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    return linked(tiny_work, tmp_path / "work")


@pytest.mark.parametrize(
    ("family", "dtype", "head"),
    [
        pytest.param(family, dtype, head, marks=pytest.mark.bars if family in FURTHER and dtype == "bf16" else ())
        for family, dtype, head in product(FAMILIES, ["fp32", "bf16"], ["tokens", "scalar"])
        if head == "tokens" or family in SCORED
    ],
)
def test_what_transformers_saves_comes_in_and_goes_out_again(
    family: str, dtype: str, head: str, work: WorkDirectory, tmp_path: Path, monkeypatch
):
    """transformers loads our folder and saves it in several files; import and export give the same bytes."""
    ours = our_model(of_tests(family, head=head))
    kind = transformers.AutoModelForCausalLM if head == "tokens" else transformers.AutoModelForSequenceClassification
    theirs = kind.from_pretrained(saved(tmp_path / "hf", ours, work, dtype), local_files_only=True)
    theirs.save_pretrained(tmp_path / "x", max_shard_size="100KB")
    assert (tmp_path / "x" / "model.safetensors.index.json").is_file()
    shutil.copyfile(work.tokenizer_model, tmp_path / "x" / "tokenizer.model")
    run = import_model(str(tmp_path / "x"), "mine", work)
    assert replace(model_config_of(files.find_checkpoint(run.path)), name=ours.config.name) == ours.config
    if dtype == "fp32":
        weights = model_weights(files.find_checkpoint(run.path))
        state = ours.state_dict() | ({"scalar_head.bias": torch.zeros(1)} if head == "scalar" else {})
        assert weights.keys() == state.keys()
        assert all(np.array_equal(weights[name], state[name].numpy()) for name in weights)
    monkeypatch.setattr(exporting, "FILE_BYTES", 150_000)
    export(run.path, tmp_path / "again", dtype)
    expected, found = read_all(tmp_path / "x"), read_all(tmp_path / "again")
    if "embed_out.weight" in found and "lm_head.weight" in expected:
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    assert found == expected
    again = kind.from_pretrained(tmp_path / "again", local_files_only=True)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.heavy
def test_an_exported_run_writes_the_same_text(work: WorkDirectory, tmp_path: Path):
    run = untrained(work)
    export(run.path, tmp_path / "hf", "fp32")
    loaded = load_model(run.path)
    model = Transformer(loaded.config)
    model.load_state_dict(loaded.weights)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    for text in ("def value_1(name):\n", "SELECT count FROM", "echo  \u2581 naïve\n\n"):
        ids = [loaded.tokenizer.eot_id, *loaded.tokenizer.encode(text)]
        assert tokenizer(text).input_ids == ids
        written = theirs.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0].tolist()
        for _ in range(len(written) - len(ids)):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert written == ids
    assert tokenizer.chat_template == chat_template()
    ends = [loaded.tokenizer.eot_id, loaded.tokenizer.special_ids["<|im_end|>"]]
    assert theirs.generation_config.eos_token_id == ends
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "GPTNeoXForCausalLM" in card
    assert re.search(r"^\| code \| 540 \| [\d,]+ \| none \(600\) \|$", card, re.M), card


def test_a_qwen2_model_has_its_own_ids_by_the_class_that_the_card_names(work: WorkDirectory, tmp_path: Path):
    run = import_model(str(saved(tmp_path / "hf", our_model(of_tests("Qwen2")), work)), "mine", work)
    export(run.path, tmp_path / "again")
    assert "PreTrainedTokenizerFast.from_pretrained" in (tmp_path / "again" / "README.md").read_text()
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again", local_files_only=True)
    text, tokenizer = "def value_1(name):\n    return 12\n", load_model(run.path).tokenizer
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


@pytest.mark.heavy
def test_an_export_comes_back(work: WorkDirectory, tmp_path: Path):
    run = untrained(work)
    export(run.path, tmp_path / "hf", "fp32")
    back = import_model(str(tmp_path / "hf"), "back", work)
    own, found = (model_weights(files.find_checkpoint(one.path)) for one in (run, back))
    assert own.keys() == found.keys()
    assert all(np.array_equal(own[name], found[name]) for name in own)
    assert back.tokenizer_model.read_bytes() == work.tokenizer_model.read_bytes()
    assert load_model(back.path).tokenizer.sha256 == load_model(run.path).tokenizer.sha256


@pytest.mark.heavy
def test_an_earlier_export_is_replaced_and_nothing_else(work: WorkDirectory, tmp_path: Path):
    run, folder = untrained(work), tmp_path / "hf"
    folder.mkdir()
    export(run.path, folder)
    before = read_all(folder)
    export(run.path, folder, "fp32")
    assert read_all(folder) != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"notes\.txt, which no export wrote"):
        export(run.path, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ConfigError, match="--dtype=fp8: expected bf16 or fp32"):
        export(run.path, tmp_path / "other", "fp8")


@pytest.mark.heavy
def test_a_model_without_an_architecture_is_refused(work: WorkDirectory, tmp_path: Path):
    run = untrained(work)
    checkpoint = files.find_checkpoint(run.path)
    content = json.loads((checkpoint / files.STATE).read_text())
    content["model"]["bias"] = False
    (checkpoint / files.STATE).write_text(json.dumps(content))
    manifest = {name: entry.sha256 for name, entry in files.read_manifest(checkpoint).items()}
    from dist_lm.storage import durable

    files.write_manifest(checkpoint, manifest | {files.STATE: durable.sha256_of(checkpoint / files.STATE)})
    with pytest.raises(ConfigError, match=r"model\.bias=False: Starcoder2 of transformers, which is nearest, has True"):
        export(run.path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor=None"),
        ("Llama 3.1", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, r"model\.rope_factor=0\.5"),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type=dynamic"),
        ("Llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor=None"),
        ("YaRN", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "rope_scaling.truncate=1"),
        ("YaRN", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, r"model\.rope_beta_fast=0\.5"),
        ("YaRN", {"rope_theta": 1.0}, r"model\.rope_base=1\.0: expected a number above 1"),
        ("SmolLM3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]: expected a list of 2 numbers"),
        ("SmolLM3", {"no_rope_layers": [1, "0"]}, "no_rope_layers=0: expected 0 or 1"),
        ("SmolLM3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0: expected an int"),
        ("Llama", {"hidden_act": "relu2"}, "hidden_act=relu2: expected one of silu, gelu"),
        ("Llama", {"mlp_bias": True}, r"model.layers.0.mlp.gate_proj.bias is missing"),
        ("Llama", {"model_type": "mamba"}, "model_type=mamba"),
        ("Llama", {"architectures": ["LlamaForTokenClassification"]}, "architectures=LlamaForTokenClassification"),
        ("Llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ("Llama", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map="),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0: expected an integer from 1"),
        ("Qwen3", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers=-1: expected an integer"),
        ("Qwen3", {"attention_bias": True}, r"model.layers.0.self_attn.q_proj.bias is missing"),
        ("Phi3", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_scaling.rope_type=longrope"),
        ("Phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type=yarn"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=sliding_attention"),
        ("Qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types=.*expected 2 names"),
        ("Mistral with a window", {"layer_types": ["full_attention"] * 2}, "layer_types=full_attention: expected slid"),
        ("Qwen2", {"head_dim": 12}, "head_dim=12: expected 10"),
        ("Pythia", {"rotary_pct": 0.3}, r"model\.rotary_fraction=0\.3"),
        ("Pythia", {"attention_bias": False}, r"gpt_neox.layers.0.attention.\w+.bias: the model has no"),
        ("Pythia", {"hidden_act": "gelu_fast"}, "hidden_act=gelu_fast"),
        ("Starcoder2", {"sliding_window": "4096"}, "sliding_window=4096: expected an integer"),
        ("Arcee", {"hidden_act": "silu"}, "hidden_act=silu"),
        ("Llama", {"num_hidden_layers": 3}, r"model.layers.2.* is missing"),
        ("Llama", {"num_hidden_layers": 1}, r"model.layers.1.*: the model has no place for this tensor"),
        ("Llama", {"intermediate_size": 78}, r"has shape \(77, 50\), expected \(78, 50\)"),
        ("Llama", {"vocab_size": 600}, "640 pieces, the embedding has 600 rows|has shape"),
    ],
)
def test_what_our_model_lacks_is_refused_by_name(
    family: str, changes: dict, named: str, work: WorkDirectory, tmp_path: Path
):
    folder = saved(tmp_path / "hf", our_model(of_tests(family)), work)
    config_changed(folder, **changes)
    with pytest.raises(ArtefactError, match=named):
        import_model(str(folder), "mine", work)
    assert not (work.path / "runs" / "import" / "mine").exists()


def test_folders_that_hold_no_model_are_refused(work: WorkDirectory, tmp_path: Path):
    with pytest.raises(ArtefactError, match="no such folder, and no id of the hub"):
        import_model(str(tmp_path / "nothing"), "mine", work)
    with pytest.raises(ConfigError, match=r"NAME=\.\./out"):
        import_model(str(tmp_path), "../out", work)
    with pytest.raises(ArtefactError, match=r"config\.json is missing"):
        import_model(str(tmp_path), "mine", work)
    folder = saved(tmp_path / "hf", our_model(of_tests("Llama")), work)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ArtefactError, match="cut short"):
        import_model(str(folder), "mine", work)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors is missing"):
        import_model(str(folder), "mine", work)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ArtefactError, match="no tokenizer"):
        import_model(str(folder), "mine", work)


def test_an_import_without_an_end_of_text_names_that_of_the_model(work: WorkDirectory, tmp_path: Path):
    folder = saved(tmp_path / "hf", our_model(of_tests("Llama")), work)
    content = trained_json(["a text"], 300)
    (folder / "tokenizer.json").write_bytes(content.replace(b"<|endoftext|>", b"<stop>"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    with pytest.raises(
        ArtefactError, match=r"tokenizer.json has no end-of-text .*rename <stop>, its eos_token, to <\|e"
    ):
        import_model(str(folder), "mine", work)
    deepseek = "<｜end▁of▁sentence｜>"
    (folder / "tokenizer.json").write_bytes(content.replace(b"<|endoftext|>", deepseek.encode()))
    tokenizer = load_model(import_model(str(folder), "mine", work).path).tokenizer
    assert tokenizer.pieces([tokenizer.eot_id]) == [deepseek]


def test_defaults_of_transformers_are_ours():
    """A key that config.json lacks means what transformers takes for it."""
    from dist_lm.interop.architectures import FAMILIES as KNOWN

    for name, family in KNOWN.items():
        theirs = getattr(transformers, f"{name}Config")()
        assert getattr(theirs, "default_theta", 10000.0) == family.rope_theta
        for key, value in family.defaults.items():
            if key == "partial_rotary_factor":
                assert theirs.rope_parameters[key] == value
            elif key == "sliding_window":  # which an instance drops if it is not used
                assert getattr(type(theirs), key) == value
            elif key in ("attention_bias", "mlp_bias"):
                assert getattr(theirs, key, value) == value
            else:
                assert getattr(theirs, key) == value, (name, key)


def byte_level_tokenizer(path: Path) -> None:
    """A `tokenizer.json` with 257 pieces: the bytes and end-of-text."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))


def test_rows_without_a_piece_get_special_tokens(work: WorkDirectory, tmp_path: Path):
    folder = saved(tmp_path / "hf", our_model(small("Llama", vocab_size=264)), work)
    byte_level_tokenizer(folder / "tokenizer.json")  # it is preferred to tokenizer.model
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    run = import_model(str(folder), "mine", work)
    loaded, plain = load_model(run.path).tokenizer, Tokenizer.load(folder / "tokenizer.json")
    assert (loaded.vocab_size, plain.vocab_size) == (264, 257)
    for text in ("def value(): pass", "<|unused_257|> is text, so is <|endoftext|>"):
        assert loaded.encode(text) == plain.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    export(run.path, tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", local_files_only=True)
    assert theirs("def value", add_special_tokens=False).input_ids == plain.encode("def value")


MEMORY = """
import sys
from pathlib import Path
import torch
from dist_lm.config.model import ModelConfig
from dist_lm.model.size import parameter_shapes
from dist_lm.stages.exporting import files as export
from dist_lm.stages.importing import snapshot as importing
from dist_lm.storage.run_directory import WorkDirectory
from tests.anonymous_memory import rise_of

folder, tokenizer, work = (Path(word) for word in sys.argv[1:])
model = ModelConfig("wide", d_model=1024, n_layers=5, n_heads=8, d_ff=8192, max_seq_len=64, vocab_size=640)
shapes = parameter_shapes(model)
folder.mkdir()
(folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}

def in_and_out():
    export.write_model(folder, model, lambda name: torch.ones(shapes[name]), "fp32", ids)
    run = importing.import_model(str(folder), "wide", WorkDirectory(work))
    export.export(run.path, folder.with_name("again"), "bf16")

print(rise_of(in_and_out))
"""


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_that_of_a_few_copies_of_one_tensor(work: WorkDirectory, tmp_path: Path):
    """425 MB of weights, the largest tensor has 34 MB."""
    command = [sys.executable, "-c", MEMORY, tmp_path / "hf", work.tokenizer_model, work.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(250), env=os.environ)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5 * 34e6


def test_a_run_starts_from_an_import(work: WorkDirectory, tmp_path: Path):
    """conf/model/NAME.yaml of the import is the model, at the launcher as in the checkpoint."""
    run: RunDirectory = import_model(str(saved(tmp_path / "hf", our_model(of_tests("Qwen3")), work)), "mine", work)
    overrides = ["stage=code", f"hydra.searchpath=[{run.path}/conf]", "model=mine", "stage.seq_len=32"]
    config = compose_config([*overrides, f"tokenizer={run.path}/tokenizer", f"stage.init_from={run.path}"])
    state, model = files.read_state(files.find_checkpoint(run.path))
    files.check_start(run.path, model, config.model)
    assert config.model == ModelConfig(**model)
    assert state.tokenizer == load_model(run.path).tokenizer.sha256
    assert parameter_shapes(config.model)
    assert tokens_for(config.model) is not None
