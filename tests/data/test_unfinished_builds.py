"""How far a build by tasks is, told from its folder."""

from pathlib import Path

from dist_lm.data.task_results import writing
from dist_lm.data.unfinished_builds import STATE, begin_pass, unfinished_builds


def test_a_build_says_its_pass_and_how_many_results_are_there(tmp_path: Path) -> None:
    """Would find a result in writing that counts, and an older pass that is taken for the present one."""
    folder = tmp_path / "builds" / "1a2b"
    begin_pass_of(folder, "survey", 1)
    begin_pass_of(folder, "write", 2)
    (folder / "write" / ".000005.abc.tmp").mkdir()
    (build,) = unfinished_builds(tmp_path)
    assert build.text().startswith(
        f"{folder}: unfinished build of code, prose, 2 of 7 tasks of pass write, the last 0 s"
    )


def begin_pass_of(folder: Path, pass_name: str, n_results: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    begin_pass(folder, ["code", "prose"], pass_name, 7)
    for number in range(n_results):
        with writing(folder / pass_name / f"{number:06d}") as result:
            (result / "file").touch()


def test_a_build_without_a_pass_or_with_a_damaged_file_is_named_all_the_same(tmp_path: Path) -> None:
    """Would find a listing that ends with an error because a file is damaged, which the next command writes again."""
    assert unfinished_builds(tmp_path) == []
    (tmp_path / "builds" / "begun").mkdir(parents=True)
    (tmp_path / "builds" / "damaged").mkdir()
    (tmp_path / "builds" / "damaged" / STATE).write_text("{")
    texts = [build.text() for build in unfinished_builds(tmp_path)]
    assert [text.endswith("unfinished build, no pass has begun") for text in texts] == [True, True]
