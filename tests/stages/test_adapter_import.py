"""Adapters of peft come in as runs of adapters: the logits are those of transformers and peft.

peft's options (rsLoRA, ranks and scales by pattern, some layers alone, weights that are stored whole) change what the
same tensors mean, so a forgotten one would give other logits without a word.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.load import load_model
from dist_lm.interop.snapshot import named_base, named_model
from dist_lm.model.transformer import Transformer
from dist_lm.stages.exporting.files import export
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights
from tests.conftest import VOCAB_SIZE
from tests.interop.hf_models import our_model, small
from tests.stages.test_export import saved
from tests.training_run import linked

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
TOKENS_BT = torch.randint(0, 600, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    return linked(tiny_work, tmp_path / "work")


def base_folder(work: WorkDirectory, folder: Path, family: str = "Llama", **changes: Any) -> Path:
    return saved(folder / "base", our_model(small(family, vocab_size=VOCAB_SIZE, **changes)), work)


def trained(base: Path, folder: Path, add: int = 0, **options: Any) -> Path:
    """Adapters of `base` as peft saves them, with numbers that change the output; `add`: new tokens."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    if add:
        model.resize_token_embeddings(VOCAB_SIZE + add, mean_resizing=False)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
            assert "lora_magnitude" not in name or options.get("use_dora")
    model.save_pretrained(folder / "adapters")
    return folder / "adapters"


def their_logits(base: Path, adapters: Path, add: int = 0) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    if add:
        model.resize_token_embeddings(VOCAB_SIZE + add, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, adapters).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS_BT).logits


def our_logits(run: Path) -> torch.Tensor:
    loaded = load_model(run)
    model = Transformer(loaded.config)
    model.load_state_dict(loaded.weights)
    with torch.no_grad():
        return model(TOKENS_BT)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [
    ("Llama", {"target_modules": ALL}),
    ("Qwen3", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_dropout": 0.1}),
    (
        "Llama",
        {
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"v_proj": 5, "layers.0.self_attn.q_proj": 1},
            "alpha_pattern": {"o_proj": 3, r"layers\.1\..*v_proj": 40},
        },
    ),
    ("Llama", {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]}),
    ("GPTNeoX", {"target_modules": ["query_key_value", "dense"]}),
    pytest.param("Llama", {"target_modules": "all-linear"}, marks=pytest.mark.bars),
    pytest.param("Starcoder2", {"target_modules": ["c_fc", "o_proj"]}, marks=pytest.mark.bars),
    pytest.param("Arcee", {"target_modules": ["k_proj", "up_proj"]}, marks=pytest.mark.bars),
    pytest.param("Pythia", {"target_modules": ["query_key_value", "dense_h_to_4h"]}, marks=pytest.mark.bars),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_an_adapter_gives_the_logits_of_peft(family: str, options: dict, work: WorkDirectory, tmp_path: Path):
    base_path = base_folder(work, tmp_path, family)
    adapters = trained(base_path, tmp_path, **options)
    run = import_model(str(adapters), "mine", work)
    checkpoint = files.find_checkpoint(run.path)
    assert files.read_adapters(checkpoint) is not None  # a run of adapters, not a merged model
    assert_close(our_logits(run.path), their_logits(base_path, adapters))
    assert float((our_logits(run.path) - our_logits(work.run("import", "base").path)).abs().max()) > 0.01

    # and out again, over the base that it names
    export(run.path, tmp_path / "again", "fp32")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base_path)
    assert_close(their_logits(base_path, tmp_path / "again"), our_logits(run.path))


WHOLE = [
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, 0),
    ({"modules_to_save": ["input_layernorm"]}, 0),
    ({}, 3),  # new tokens: peft stores the embeddings whole
]


@pytest.mark.heavy
@pytest.mark.parametrize(("options", "add"), WHOLE, ids=str)
def test_weights_that_are_stored_whole_replace_those_of_the_base(
    options: dict, add: int, work: WorkDirectory, tmp_path: Path
):
    base_path = base_folder(work, tmp_path)
    adapters = trained(base_path, tmp_path, add, target_modules=["q_proj"], **options)
    if add:
        names = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folder(work, tmp_path))
        names.add_tokens([f"<new_{number}>" for number in range(add)], special_tokens=True)
        names.save_pretrained(adapters)
    run = import_model(str(adapters), "mine", work)
    assert_close(our_logits(run.path), their_logits(base_path, adapters, add))
    assert load_model(run.path).tokenizer.vocab_size == VOCAB_SIZE + add
    assert {path.name for path in (work.path / "runs" / "import").iterdir()} == {"mine", "mine-base"}
    export(run.path, tmp_path / "again", "fp32")  # no folder of transformers holds this base
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(work.run("import", "mine-base").path)


def tokenizer_folder(work: WorkDirectory, tmp_path: Path) -> Path:
    from dist_lm.chat.template import chat_template
    from dist_lm.interop.hf_tokenizer import save_hf_tokenizer

    save_hf_tokenizer(work.tokenizer_model, tmp_path / "names", chat_template())
    return tmp_path / "names"


def test_adapters_of_a_score_come_back(work: WorkDirectory, tmp_path: Path):
    base_path = base_folder(work, tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1, dtype="float32")
    model.config.pad_token_id = 0
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape) if parameter.requires_grad else 0
    model.save_pretrained(tmp_path / "adapters")
    run = import_model(str(tmp_path / "adapters"), "judge", work)
    config = small("Llama", vocab_size=VOCAB_SIZE, head="scalar")
    ours = Transformer(config)
    weights = model_weights(files.find_checkpoint(run.path))
    ours.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    tokens_BT = TOKENS_BT + 1  # no padding
    with torch.no_grad():
        found = ours.scalar_head(ours.hidden(tokens_BT)[:, -1])
        expected = model.eval()(input_ids=tokens_BT).logits
    assert_close(found, expected)


def test_adapters_of_the_same_base_share_its_run(work: WorkDirectory, tmp_path: Path):
    base_path = base_folder(work, tmp_path)
    adapters = trained(base_path, tmp_path, target_modules=["q_proj"])
    for name in ("one", "two"):
        import_model(str(adapters), name, work)
    assert {path.name for path in (work.path / "runs" / "import").iterdir()} == {"one", "two", "base"}
    weights = base_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtefactError, match=r"runs/import/base exists, and is not .*: remove it"):
        import_model(str(adapters), "three", work)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"use_dora": True}, r"adapter_config.json: use_dora=True: expected false: .*merge_and_unload"),
        ({"peft_type": "IA3"}, "peft_type=IA3: expected LORA"),
        ({"bias": "all"}, "bias=all: expected none"),
        ({"lora_alpha": None}, "lora_alpha=None: expected a positive number"),
        ({"alpha_pattern": {"q_proj": "1"}}, "q_proj=1: expected a positive number"),
        ({"alpha_pattern": {"(": 1}}, "adapter_config.json: reading it "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa: expected one of"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing: name the base by --base"),
        ({"base_model_name_or_path": "nowhere at all"}, "no such folder"),
    ],
)
def test_what_our_adapters_lack_is_refused_by_name(spoil: dict, words: str, work: WorkDirectory, tmp_path: Path):
    adapters = trained(base_folder(work, tmp_path), tmp_path, target_modules=["q_proj"])
    path = adapters / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    with pytest.raises(ArtefactError, match=words) as refused:
        import_model(str(adapters), "mine", work)
    assert str(refused.value).isprintable()
    assert not (work.path / "runs" / "import").exists()


def mark_in_cache(adapters: Path) -> Path:
    cached = adapters.parent / "models--stranger--adapter" / "snapshots" / "0123abc"
    cached.parent.mkdir(parents=True)
    return adapters.rename(cached)


def mark_of_download(adapters: Path) -> Path:
    (adapters / ".cache" / "huggingface").mkdir(parents=True)
    return adapters


def mark_of_git(adapters: Path) -> Path:
    (adapters / ".git").mkdir()
    return adapters


@pytest.mark.parametrize("mark", [mark_in_cache, mark_of_download, mark_of_git])
@pytest.mark.parametrize("form", ["absolute", "relative", "like an id"])
def test_a_downloaded_adapter_names_no_path_of_this_machine(
    mark: Callable[[Path], Path], form: str, work: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Finds a stranger's file that decides which model of this machine is read, and ends in an export."""
    base_path = base_folder(work, tmp_path)
    (tmp_path / "private").mkdir()
    private = base_path.rename(tmp_path / "private" / "model")
    monkeypatch.chdir(tmp_path)
    named = {"absolute": str(private), "relative": "./private/model", "like an id": "private/model"}[form]
    adapters = trained(private, tmp_path, target_modules=["q_proj"])
    config = adapters / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
    adapters = mark(adapters)
    for read in (lambda: import_model(str(adapters), "mine", work), lambda: named_model(f"hf:{adapters}")):
        with pytest.raises(ArtefactError, match=r"downloaded, and name a path of this machine.*--base BASE"):
            read()
    assert not (work.path / "runs" / "import").exists()

    import_model(str(adapters), "mine", work, str(private))
    assert (work.path / "runs" / "import" / "mine").is_dir()


def test_a_downloaded_adapter_may_name_a_model_of_the_hub(tmp_path: Path):
    (tmp_path / ".git").mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "owner/model@main"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weight = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{weight}.lora_A.weight": torch.zeros(1, 4), f"{weight}.lora_B.weight": torch.zeros(4, 1)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    assert named_base(tmp_path) == "owner/model@main"


def test_the_base_that_adapters_name_is_said(work: WorkDirectory, tmp_path: Path):
    base_path = base_folder(work, tmp_path)
    adapters = trained(base_path, tmp_path, target_modules=["q_proj"])
    said: list[str] = []
    import_model(str(adapters), "mine", work, say=said.append)
    import_model(str(adapters), "yours", work, str(base_path), say=said.append)
    assert said == [f"{adapters}/adapter_config.json names the base {base_path}; --base names another"]


def test_dora_is_refused_by_its_tensors_too(work: WorkDirectory, tmp_path: Path):
    adapters = trained(base_folder(work, tmp_path), tmp_path, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ArtefactError, match="use_dora=True"):
        import_model(str(adapters), "mine", work)
    path = adapters / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(ArtefactError, match=r"adapter_model.safetensors: .*lora_magnitude_vector"):
        import_model(str(adapters), "mine", work)


def test_adapters_of_another_model_are_refused(work: WorkDirectory, tmp_path: Path):
    adapters = trained(base_folder(work, tmp_path), tmp_path, target_modules=["q_proj"])
    other = base_folder(work, tmp_path / "other", "Qwen3", d_model=40, n_heads=4)
    with pytest.raises(ArtefactError, match=r"adapter of model.layers.0.self_attn.q_proj.weight has factors"):
        import_model(str(adapters), "mine", work, str(other))
    neox = base_folder(work, tmp_path / "neox", "GPTNeoX")
    with pytest.raises(ArtefactError, match=r"adapter of .*q_proj.weight: expected weights of attention"):
        import_model(str(adapters), "yours", WorkDirectory(tmp_path / "second"), str(neox))
    with pytest.raises(ConfigError, match="--base="):
        import_model(str(other), "whole", work, str(other))


def link_out(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(secret)


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(link_out, "is a link that leaves"), (as_pickle, "adapter_model.safetensors is missing: .*safetensors file only")],
)
def test_files_from_outside_are_not_trusted(
    spoil: Callable[[Path], None], words: str, work: WorkDirectory, tmp_path: Path
):
    adapters = trained(base_folder(work, tmp_path), tmp_path, target_modules=["q_proj"])
    spoil(adapters)
    with pytest.raises(ArtefactError, match=words):
        import_model(str(adapters), "mine", work)
