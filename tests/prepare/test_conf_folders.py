"""Configuration files of a user's own, outside the package."""

from pathlib import Path

import pytest

from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config, overrides_of, target_stage
from dist_lm.prepare.conf_folders import choices, conf_directory, with_config_dir

FILES = {
    "corpus/ours.yaml": "corpora: {notes: [{reader: tools, language: notes}]}",
    "model/ours.yaml": "defaults: [nano, _self_]\nname: ours\nn_layers: 2",
    "stage/notes.yaml": "defaults: [code, _self_]\ncorpus: notes\nsteps: 7\nseq_len: 128",
    "experiment/ours.yaml": "# @package _global_\ndefaults: [override /corpus: ours, override /model: ours]\nseed: 5",
    "recipe/ours_notes.yaml": "# @package _global_\nstage: {global_batch: 4}",
}


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with files of several groups; there is a space in its name."""
    folder = tmp_path / "our lab"
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize("flag", ["--config-dir {}", "--config-dir={}", "-cd {}", "hydra.searchpath=['{}']"])
def test_files_of_a_folder_are_choices_of_their_groups(lab, flag):
    flags = [part.format(lab) for part in flag.split(" ")]
    command = with_config_dir([*flags, "stage=notes", "corpus=ours", "model=ours"])
    target = target_stage(command)
    config = compose_config(overrides_of(target, target, command))
    assert (target, config.stage.name, config.stage.steps) == ("code", "code", 7)
    assert (config.corpus.name, list(config.corpus.corpora)) == ("ours", ["notes"])
    assert (config.model.n_layers, config.stage.global_batch) == (2, 4)
    assert compose_config(overrides_of("shards", target, command)).stage.name == "shards"


def test_an_experiment_of_a_folder_chooses_files_of_the_folder(lab):
    config = compose_config([f"hydra.searchpath=['{lab}']", "stage=notes", "experiment=ours", "corpus.name=ours"])
    assert (config.seed, config.model.name, list(config.corpus.corpora)) == (5, "ours", ["notes"])


def test_choices_are_those_of_all_folders(lab):
    found = choices("corpus", with_config_dir(["--config-dir", str(lab)]))
    assert {"ours", "local", "hub"} <= set(found)
    assert "ours" not in choices("corpus")


def test_a_relative_folder_is_that_of_the_current_one(lab, monkeypatch):
    monkeypatch.chdir(lab.parent)
    assert "ours" in choices("corpus", with_config_dir(["--config-dir", lab.name]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda lab: (lab / "corpus" / "hub.yaml").write_text("name: hub"), ["hub.yaml", "choose another name"]),
        (lambda lab: (lab / "corpus" / "more.yml").write_text("name: more"), ["more.yml", "end in .yaml"]),
        (lambda lab: (lab / "stage" / "notes.yaml").write_text("steps: 7"), ["notes.yaml", "names no stage", "code"]),
        (lambda lab: lab.rename(lab.parent / "moved"), ["--config-dir", "our lab", "there is no folder"]),
    ],
)
def test_a_folder_that_would_not_do_what_it_says_is_refused(lab, spoil, words):
    spoil(lab)
    with pytest.raises(ConfigError) as refused:
        target_stage([f"hydra.searchpath=['{lab}']", "stage=notes"])
    assert all(word in str(refused.value) for word in words)


def test_a_folder_without_groups_and_an_option_without_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"^--config-dir {tmp_path}: no folder of a group"):
        choices("corpus", with_config_dir(["--config-dir", str(tmp_path)]))
    with pytest.raises(ConfigError, match="expected a folder"):
        with_config_dir(["--config-dir"])
    with pytest.raises(ConfigError, match="folder of this machine"):
        choices("corpus", ["hydra.searchpath=['s3://bucket/conf']"])


@pytest.mark.heavy
def test_corpora_can_be_replaced_and_emptied():
    one = "corpus.corpora={code: [{reader: tools, language: x, limit: 3}]}"
    assert list(compose_config(["stage=shards", one]).corpus.corpora) == ["code"]
    assert compose_config(["stage=shards", "corpus.corpora={}"]).corpus.corpora == {}
    assert compose_config(["stage=shards", "corpus.corpora=null"]).corpus.corpora == {}
    with pytest.raises(ConfigError, match="did you mean language"):
        compose_config(["stage=shards", one.replace("language", "langage")])


def test_a_file_takes_corpora_away_from_the_one_that_it_extends(lab):
    for corpora, left in (("{language: null, tools: null}", ["code", "rankings"]), ("null", [])):
        (lab / "corpus" / "fewer.yaml").write_text(
            f"defaults: [local, _self_]\nname: fewer\ncorpora: {corpora}\n", encoding="utf-8"
        )
        found = compose_config([f"hydra.searchpath=['{lab}']", "stage=shards", "corpus=fewer"])
        assert list(found.corpus.corpora) == left


@pytest.mark.parametrize(
    ("corpora", "words"),
    [
        ("{code: [{reader: jsonl, held_out: perhaps}]}", "corpora.code[0].held_out=perhaps: expected true"),
        ("{code: {reader: jsonl}}", "own.yaml: corpora.code={'reader': 'jsonl'}: expected NAME: [{reader: ...}, ...]"),
        ("[code]", "own.yaml: corpora=['code']: expected NAME: [{reader: ...}, ...]"),
    ],
)
def test_a_wrong_source_of_a_file_is_named_by_file_and_place(lab, corpora, words):
    (lab / "corpus" / "own.yaml").write_text(f"name: own\ncorpora: {corpora}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        compose_config([f"hydra.searchpath=['{lab}']", "stage=shards", "corpus=own"])
    assert words in str(refused.value)


def test_a_share_of_zero_takes_out_what_the_varied_stage_mixes_in():
    assert set(compose_config(["stage=tools"]).stage.mix or {}) == {"code", "language"}
    assert compose_config(["stage=tools", "stage.mix.language=0"]).corpus_names == ("tools", "code")


@pytest.mark.parametrize("override", ["corpus=null", "model=null", "stage=null", "experiment=null"])
def test_a_group_is_not_left_out(override):
    with pytest.raises(ConfigError, match=f"{override}: expected one of"):
        compose_config([override])


def test_a_work_directory_is_no_address():
    with pytest.raises(ConfigError, match="work_dir=s3://bucket/work: expected a folder"):
        compose_config(["work_dir=s3://bucket/work"])


def test_nothing_of_the_package_is_among_the_folders_of_a_user(lab):
    with pytest.raises(ConfigError, match="has the same name"):
        choices("corpus", [f"hydra.searchpath=['{conf_directory()}']"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("corpora:\n  code:\n  - {reader: jsonl, path: /a\n", "4: no YAML: "),
        ("name: bad\ncorpora:\n\tcode: []\n", "3: no YAML: "),
        ("corpora:\n  code: []\n  code: []\n", "3: the key code is given twice: expected each key once$"),
        ("name: 'bad\n", "2: no YAML: "),
    ],
)
@pytest.mark.parametrize("group", ["corpus", "stage"])
def test_a_file_that_is_no_yaml_is_one_line_with_its_place(lab, group, text, problem):
    (lab / group / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"{group}/bad\.yaml:{problem}") as refused:
        compose_config([f"hydra.searchpath=['{lab}']", f"{group}=bad"])
    assert "\n" not in str(refused.value)


def test_a_file_with_a_character_that_yaml_forbids_is_one_line(lab):
    (lab / "corpus" / "bad.yaml").write_bytes(b"name: a\x00\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml") as refused:
        compose_config([f"hydra.searchpath=['{lab}']", "stage=shards", "corpus=bad"])
    assert "\n" not in str(refused.value)


def test_a_file_of_another_encoding_is_one_line(lab):
    (lab / "corpus" / "bad.yaml").write_bytes("name: \u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        compose_config([f"hydra.searchpath=['{lab}']", "stage=shards", "corpus=bad"])


@pytest.mark.heavy
def test_a_stage_file_needs_a_copy_of_the_recipe_and_the_error_says_so(lab):
    (lab / "stage" / "drafts.yaml").write_text("defaults: [code, _self_]\n")
    command = [f"hydra.searchpath=['{lab}']", "stage=drafts", "model=nano"]
    copy = lab / "recipe" / "nano_drafts.yaml"
    with pytest.raises(ConfigError, match=r"nano_code\.yaml does not apply to stage=drafts: copy it to ") as refused:
        compose_config(command)
    assert str(copy) in str(refused.value)
    copy.write_text((conf_directory() / "recipe" / "nano_code.yaml").read_text())
    assert compose_config(command).stage == compose_config(["stage=code", "model=nano"]).stage
