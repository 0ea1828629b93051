"""Import and export of `model=large` hold about one tensor in memory. Writes 11 GB; --basetemp says where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import patient
from tests.stages.test_export import byte_level_tokenizer

PROGRAM = """
import sys
from pathlib import Path
import torch
from dist_lm.prepare.compose import compose_config
from dist_lm.model.size import parameter_count, parameter_shapes
from dist_lm.stages.exporting import files as export
from dist_lm.stages.importing import snapshot as importing
from dist_lm.storage.run_directory import WorkDirectory
from tests.anonymous_memory import rise_of

folder, tokenizer, work = (Path(word) for word in sys.argv[1:])
model = compose_config(["stage=code", "model=large"]).model
shapes = parameter_shapes(model)
folder.mkdir()
(folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
export.write_model(folder, model, lambda name: torch.randn(shapes[name]), "fp32", ids)
largest = max(torch.Size(shape).numel() for shape in shapes.values()) * 4
print(parameter_count(model), largest)
print(rise_of(lambda: importing.import_model(str(folder), "large", WorkDirectory(work))))
run = WorkDirectory(work).run("import", "large")
print(rise_of(lambda: export.export(run.path, folder.with_name("again"), "fp32")))
"""


@pytest.mark.bars
@pytest.mark.timeout(3600)
def test_memory_of_large_is_below_one_gib_over_a_tensor(tmp_path: Path):
    byte_level_tokenizer(tmp_path / "tokenizer.json")
    command = [sys.executable, "-c", PROGRAM, tmp_path / "hf", tmp_path / "tokenizer.json", tmp_path / "work"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(3500), env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    parameters, largest, importing, exporting = map(int, done.stdout.split())
    assert parameters > 1e9
    for name, rise in (("import", importing), ("export", exporting)):
        print(f"\n{name}: {rise / 2**20:,.0f} MiB; the largest tensor has {largest / 2**20:,.0f} MiB")
        assert rise < largest + 2**30
