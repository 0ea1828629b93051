"""The plan of a build holds every file once, in order, and divides no repository."""

import random
from dataclasses import replace

from dist_lm.data.build_plan import plan_fingerprint, plan_source
from dist_lm.data.inputs import Input

TASK_BYTES = 100


def random_files(generator: random.Random) -> list[tuple[Input, str]]:
    """Returns files outside of repositories and in them, some larger than a task or of unknown size."""
    files = []
    for unit in range(generator.randrange(1, 30)):
        repository = f"repository{unit}" if generator.random() < 0.4 else ""
        n_files = generator.randrange(1, 6) if repository else 1
        for number in range(n_files):
            size = generator.choice([-1, 0, 1, 20, 60, 99, 100, 101, 500])
            files.append((Input(f"{unit}/{number}", size), repository))
    return files


def test_every_file_is_in_one_task_in_order():
    """Would find a file that is lost or read twice at the border of a task."""
    for seed in range(50):
        files = random_files(random.Random(seed))
        tasks = plan_source("text", 0, files, TASK_BYTES)
        assert [file for task in tasks for file in task.files] == [file for file, _ in files]


def test_a_repository_is_in_one_task():
    """Would find a repository whose files are in two tasks, so that they are no neighbours in the corpus."""
    for seed in range(50):
        files = random_files(random.Random(seed))
        task_of = {
            file.name: number
            for number, task in enumerate(plan_source("text", 0, files, TASK_BYTES))
            for file in task.files
        }
        for repository in {repository for _, repository in files if repository}:
            assert len({task_of[file.name] for file, name in files if name == repository}) == 1


def test_only_what_cannot_be_divided_exceeds_a_task():
    """Would find tasks that grow with the source."""
    for seed in range(50):
        files = random_files(random.Random(seed))
        repository_of = {file.name: repository or file.name for file, repository in files}
        for task in plan_source("text", 0, files, TASK_BYTES):
            if task.n_bytes > TASK_BYTES:
                assert len({repository_of[file.name] for file in task.files if file.size}) == 1


def test_small_files_share_a_task():
    """Would find a plan of one task a file, whose overhead is larger than its work."""
    files = [(Input(str(number), 10), "") for number in range(100)]
    assert len(plan_source("text", 0, files, TASK_BYTES)) == 10


def test_generated_text_is_one_task():
    """Would find a source without files that no task reads."""
    (task,) = plan_source("text", 3, [])
    assert (task.source, task.files) == (3, ())


def test_every_change_of_an_input_changes_the_plan():
    """Would find a result that is used again although its input changed."""
    file = Input("a", 10, 1, "etag")
    before = plan_fingerprint(plan_source("text", 0, [(file, "")]))
    for changed in (
        replace(file, name="b"),
        replace(file, size=11),
        replace(file, mtime_ns=2),
        replace(file, etag="other"),
    ):
        assert plan_fingerprint(plan_source("text", 0, [(changed, "")])) != before
    assert plan_fingerprint(plan_source("text", 1, [(file, "")])) != before
    assert plan_fingerprint(plan_source("other", 0, [(file, "")])) != before
