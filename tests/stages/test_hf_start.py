"""`stage.init_from=hf:SOURCE` imports on the way, `stage=export` writes a folder, and both are lines of the plan."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.prepare.plan import Plan, make_plan
from dist_lm.stages.exporting.adapters import source_of_base
from dist_lm.stages.exporting.files import export
from dist_lm.stages.exporting.stage import STAGE as EXPORT
from dist_lm.stages.exporting.stage import push_folder
from dist_lm.stages.importing.stage import STAGE as IMPORT
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.symbols import CALL
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.console import Console
from dist_lm.training.checkpoint_files import find_checkpoint
from dist_lm.training.checkpoint_tensors import model_weights, tensors_in
from tests.conftest import VOCAB_SIZE
from tests.interop.hf_models import our_model, small
from tests.patience import patient
from tests.stages.test_export import saved, untrained
from tests.tokenizer.made_json import trained_json
from tests.tokenizer.stdlib_text import stdlib_texts
from tests.training_run import linked

pytest.importorskip("transformers")
PLAIN = ("tracking=none", "device=cpu")


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    return linked(tiny_work, tmp_path / "work")


@pytest.fixture
def snapshot(work: WorkDirectory, tmp_path: Path) -> Path:
    """A Llama of transformers with the tokenizer of the work directory."""
    config = small("Llama", d_model=40, d_ff=80, max_seq_len=256, vocab_size=VOCAB_SIZE, rope_base=500.0)
    return saved(tmp_path / "Llama-tiny", our_model(config), work)


def planned(work: WorkDirectory, target: str, *overrides: str) -> Plan:
    shorter = () if target in ("import", "export") else ("stage.seq_len=32",)
    given = [f"stage={target}", *PLAIN, *shorter, f"work_dir={work.path}", *overrides]
    return make_plan(target, lambda stage: compose_config(overrides_of(stage, target, given)))


def actions(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.action.value for stage in plan.stages}


@pytest.mark.heavy
def test_the_plan_imports_once_and_the_model_follows(work: WorkDirectory, snapshot: Path):
    plan = planned(work, "code", f"stage.init_from=hf:{snapshot}")
    assert actions(plan) == {"import": "build", "tokenizer": "there", "shards": "there", "code": "build"}
    config = plan.target.config
    shape = (config.model.name, config.model.norm, config.model.n_kv_heads, config.model.rope_base)
    assert shape == ("Llama-tiny", "rmsnorm", small("Llama").n_kv_heads, 500.0)
    assert config.stage.init_from == str(work.run("import", "Llama-tiny").path.resolve())
    assert config.tokenizer.source == f"hf:{snapshot}"
    assert "LlamaForCausalLM" in plan.stages[0].detail
    assert f"from hf:{snapshot}" in plan.target.detail
    assert not (work.path / "runs").exists()  # a plan writes nothing

    IMPORT.build(plan.stages[0].config, Console())
    plan = planned(work, "code", f"stage.init_from=hf:{snapshot}")
    assert actions(plan) == {"import": "there", "tokenizer": "there", "shards": "there", "code": "build"}
    (snapshot / "config.json").touch()  # another time, the same content
    assert actions(planned(work, "code", f"stage.init_from=hf:{snapshot}"))["import"] == "there"
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtefactError, match=r"differs from that \(model\.safetensors\)"):
        planned(work, "code", f"stage.init_from=hf:{snapshot}")


@pytest.mark.heavy
def test_marks_that_a_tokenizer_lacks_get_rows_of_their_own(work: WorkDirectory, tmp_path: Path):
    """Finds other ids or weights of the tokens that were there, rows without a value, and a plan without the marks; and
    adapters that peft would put over the folder of the source, which lacks these rows."""
    content = trained_json(stdlib_texts()[:5], 320)
    model = small("Llama", d_model=40, d_ff=80, max_seq_len=256, vocab_size=320, tie_embeddings=False)
    folder = saved(tmp_path / "Llama-base", our_model(model), work)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_bytes(content)
    fresh = WorkDirectory(tmp_path / "fresh")
    start = (f"stage.init_from=hf:{folder}", "tokenizer.add_marks=true")

    plan = planned(fresh, "sft", *start)
    assert actions(plan)["import"] == "build"
    run = fresh.run("import", "Llama-base-marks")
    assert plan.target.config.stage.init_from == str(run.path.resolve())
    IMPORT.build(plan.stages[0].config, Console())
    assert actions(planned(fresh, "sft", *start))["import"] == "there"
    assert actions(planned(fresh, "sft", start[0]))["import"] == "build"  # without marks it is another model

    before, after = Tokenizer(content, "base"), Tokenizer.load(run.path / "tokenizer/tokenizer.json")
    vocab_size = plan.target.config.model.vocab_size
    assert after.vocab_size == vocab_size > 320
    text = "def area(w, h):\n    return w * h\n"
    assert after.encode(text) == before.encode(text)
    assert after.mark_id(CALL) >= 320

    weights = model_weights(find_checkpoint(run.path))
    stored = {tensor.name: tensor for tensor in tensors_in(folder / "model.safetensors").values()}
    for name, theirs in (("embedding.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
        old = stored[theirs].read().view(np.float32).reshape(stored[theirs].shape)
        assert np.array_equal(weights[name][:320], old)
        assert weights[name].shape == (vocab_size, old.shape[1])
        assert np.allclose(weights[name][320:], old.mean(0), atol=1e-7)
    assert source_of_base(find_checkpoint(run.path)) == ""


@pytest.mark.parametrize(
    ("source", "expected"), [("hf:org/name", "org/name"), ("hf:theirs/chat.gguf", ""), ("chat.gguf", "")]
)
def test_the_base_that_adapters_name_is_one_that_peft_loads(work: WorkDirectory, source: str, expected: str):
    """Finds adapter_config.json with the name of a GGUF file as the base."""
    run = work.run("import", "theirs")
    checkpoint = run.checkpoints / "step_00000000"
    checkpoint.mkdir(parents=True)
    run.config.write_text(f"model:\n  name: theirs\nimported:\n  source: {source}\n")
    assert source_of_base(checkpoint) == expected


@pytest.mark.heavy
def test_the_plan_imports_adapters_over_their_base(work: WorkDirectory, snapshot: Path, tmp_path: Path):
    """Shape and tokenizer are those of the base, which has a run of its own."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(snapshot)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapted")
    source = f"stage.init_from=hf:{tmp_path / 'adapted'}"
    plan = planned(work, "code", source)
    assert actions(plan) == {"import": "build", "tokenizer": "there", "shards": "there", "code": "build"}
    assert plan.target.config.model.rope_base == 500.0
    assert plan.target.config.stage.init_from == str(work.run("import", "adapted").path.resolve())
    IMPORT.build(plan.stages[0].config, Console())
    assert actions(planned(work, "code", source))["import"] == "there"
    assert (work.path / "runs" / "import" / "Llama-tiny").is_dir()

    moved = snapshot.rename(tmp_path / "moved")
    (work.path / "runs" / "import" / "adapted").rename(tmp_path / "old")
    with pytest.raises(ArtefactError, match=r"base_model_name_or_path=.*Llama-tiny.* dist-lm import .*--base"):
        planned(work, "code", source)
    assert moved.is_dir()


@pytest.mark.heavy
def test_preferences_alone_need_no_more_than_an_open_model(work: WorkDirectory, snapshot: Path, tmp_path: Path):
    """The command that `data new` prints for a file of preferences: nothing else has to be there."""
    rows, lab = tmp_path / "pairs.jsonl", tmp_path / "lab" / "corpus"
    rows.write_text(json.dumps({"prompt": "Where?", "chosen": "Here.", "rejected": "No."}) + "\n")
    lab.mkdir(parents=True)
    (lab / "ours.yaml").write_text(
        f"name: ours\ncorpora:\n  rankings:\n  - {{reader: preferences, path: {rows}, language: ours, licence: own}}\n"
    )
    start = [f"hydra.searchpath=[{lab.parent}]", "corpus=ours", f"stage.init_from=hf:{snapshot}"]
    for stage in ("preference", "reward"):
        plan = planned(WorkDirectory(tmp_path / "fresh"), stage, *start)
        assert {name for name, action in actions(plan).items() if action == "build"} >= {"import", "rankings", stage}
        assert not {"language", "code", "tools"} & {*actions(plan)}


@pytest.mark.heavy
def test_a_stage_on_the_way_may_start_from_a_snapshot(work: WorkDirectory, snapshot: Path):
    plan = planned(work, "export", f"stages.code.init_from=hf:{snapshot}", "stages.code.seq_len=32")
    assert list(actions(plan)) == ["import", "tokenizer", "shards", "code", "export"]  # no language
    assert plan.stages[3].config.model.name == "Llama-tiny"
    assert plan.target.detail.startswith(f"code to {work.path}/exports/default-code")


@pytest.mark.heavy
def test_what_the_command_names_must_fit_the_snapshot(work: WorkDirectory, snapshot: Path):
    with pytest.raises(ArtefactError, match=r"d_model"):
        planned(work, "code", f"stage.init_from=hf:{snapshot}", "model=nano")
    shorter = planned(work, "code", f"stage.init_from=hf:{snapshot}", "model.init_std=0.5")
    assert shorter.target.config.model.init_std == 0.5
    with pytest.raises(ArtefactError, match="no such folder, and no id of the hub"):
        planned(work, "code", "stage.init_from=hf:nothing")
    with pytest.raises(ConfigError, match=r"stage\.init_from=: expected hf:FOLDER"):
        planned(work, "import")


@pytest.mark.heavy
def test_an_export_is_written_once(work: WorkDirectory, tmp_path: Path):
    run, folder = untrained(work), tmp_path / "out"
    given = (f"stage.init_from={run.path}", f"stage.folder={folder}", "stage.dtype=fp32")
    plan = planned(work, "export", *given)
    assert actions(plan) == {"export": "build"}
    EXPORT.build(plan.target.config, Console())
    assert (folder / "model.safetensors").is_file()
    assert actions(planned(work, "export", *given)) == {"export": "there"}
    assert actions(planned(work, "export", *given[:2])) == {"export": "build"}  # in bf16
    (folder / "README.md").write_text("My own words.\n")
    assert actions(planned(work, "export", *given)) == {"export": "there"}
    for _ in range(2):
        EXPORT.build(plan.target.config, Console())
        assert (folder / "README.md").read_text() == "My own words.\n"
    (folder / "README.md").unlink()
    EXPORT.build(plan.target.config, Console())
    assert "# code/default" in (folder / "README.md").read_text()
    EXPORT.build(planned(work, "export", *given[:2]).target.config, Console())
    assert "weights in bf16" in (folder / "README.md").read_text()  # one that nobody edited is written again
    EXPORT.build(plan.target.config, Console())
    (folder / "config.json").unlink()
    assert actions(planned(work, "export", *given)) == {"export": "build"}
    for wrong, named in (("stage.dtype=fp8", "stage.dtype=fp8"), ("stage.push=a/b/c", "stage.push=a/b/c")):
        with pytest.raises(ConfigError, match=named):
            planned(work, "export", *given, wrong)


class FakeHub:
    """What `huggingface_hub.HfApi` is asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.error = error

    def create_repo(self, repository: str, **options) -> None:
        if self.error:
            raise self.error
        self.asked.append((repository, options))

    def upload_folder(self, **options) -> None:
        self.asked.append(("upload", options))


@pytest.mark.heavy
def test_a_push_uploads_the_folder_to_a_private_repository(work: WorkDirectory, tmp_path: Path):
    run, folder, hub = untrained(work), tmp_path / "out", FakeHub()
    export(run.path, folder)
    push_folder(folder, "me/mine", hub)
    (repository, made), (_, uploaded) = hub.asked
    assert repository == uploaded["repo_id"] == "me/mine"
    assert made["private"] is True
    assert uploaded["folder_path"] == str(folder)
    assert uploaded["ignore_patterns"] == ["export.json"]
    from huggingface_hub.utils import filter_repo_objects

    there = ["model.safetensors", "model-00002-of-00002.safetensors", "adapter_config.json", "model-F16.gguf", "my.txt"]
    there += [path.name for path in folder.iterdir()]
    removed = {*filter_repo_objects(there, allow_patterns=uploaded["delete_patterns"])}
    assert {*there} - removed == {"my.txt", "README.md", "export.json"}
    assert json.loads((folder / "export.json").read_text())["pushed"] == "me/mine"
    given = (f"stage.init_from={run.path}", f"stage.folder={folder}")
    assert actions(planned(work, "export", *given, "stage.push=me/mine")) == {"export": "there"}
    assert actions(planned(work, "export", *given, "stage.push=me/other")) == {"export": "build"}
    (folder / "README.md").write_text("edited")
    assert actions(planned(work, "export", *given, "stage.push=me/mine")) == {"export": "there"}
    (folder / "README.md").unlink()
    assert actions(planned(work, "export", *given, "stage.push=me/mine")) == {"export": "build"}
    with pytest.raises(ArtefactError, match=r"me/mine: the hub did not take .*no network"):
        push_folder(folder, "me/mine", FakeHub(OSError("no network")))


@pytest.mark.cluster
@pytest.mark.heavy
def test_one_command_imports_trains_and_exports(work: WorkDirectory, snapshot: Path, tmp_path: Path):
    """On two ranks with tp 2; the second command finds everything there."""
    own = (
        "steps=2",
        "warmup_steps=1",
        "global_batch=4",
        "micro_batch=2",
        "seq_len=32",
        "sampling.samples_per_prompt=0",
    )
    command = [sys.executable, "-m", "dist_lm.launch", "stage=export", *PLAIN, f"work_dir={work.path}"]
    command += [f"stages.code.init_from=hf:{snapshot}", *(f"stages.code.{one}" for one in own)]
    command += ["parallel.tp=2", "cluster.ranks_per_node=2", f"stage.folder={tmp_path / 'out'}", "stage.dtype=fp32"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=patient(400), check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert model.config.model_type == "llama"
    assert "build" not in done.stdout
