"""Functions that a model may call with code."""

import shutil

import pytest

from dist_lm.chat.messages import Call
from dist_lm.sandbox.tool import run_bash, run_sql
from dist_lm.tools.use.toolbox import Limits, Toolbox

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


def test_output_or_what_went_wrong():
    assert run_bash("echo $((2 + 3))") == {"output": "5\n"}
    assert run_sql("select 1, 'a'") == {"output": "1|a\n"}
    failed = run_bash("cat /etc/passwd")
    assert failed["outcome"] == "failed"
    assert "/etc/passwd" in failed["output"]


def test_a_toolbox_offers_them(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text("from dist_lm.sandbox.tool import run_python\n\nTOOLS = [run_python]\n")
    with Toolbox(file, Limits(seconds=60, characters=1_000)) as toolbox:
        assert [tool.name for tool in toolbox.tools] == ["run_python"]
        assert toolbox.run(Call("run_python", {"code": "print(6 * 7)"})) == {"output": "42\n"}
