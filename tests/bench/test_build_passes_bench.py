"""The bench of a build by tasks: each pass has a rate, and the serial part is measured without what tasks do."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.bench.build_passes import PASSES_OF, SERIAL, TERABYTE, facts_of_passes, facts_of_serial_part, write_copies
from dist_lm.bench.data import Work, cases, no_cleaning
from dist_lm.data.build_folder import Build


def test_the_serial_part_is_that_of_the_whole_corpus(tmp_path: Path) -> None:
    """Would find hours that are not those of the documents, and made-up results that the passes cannot read."""
    n_documents = 2_000_000
    facts = facts_of_serial_part(tmp_path / "build", n_tasks=2, task_documents=300, n_documents=n_documents)
    assert 0 < facts[SERIAL] * n_documents / 1e6 / 3600 <= facts[TERABYTE]


@pytest.mark.heavy
def test_each_pass_has_a_rate_and_works_on_copies(tmp_path: Path) -> None:
    """Would find a search that is measured where there is nothing to find."""
    (case,) = cases(["tokenizer.workers=1"], quick=True)
    config = replace(case.config, tokenizer=replace(case.config.tokenizer, train_bytes=1_000_000))
    work = Work(tmp_path, config, no_cleaning())
    texts = [document.text for document in work.documents(work.n_bytes)]
    n_bytes = work.n_bytes + write_copies(tmp_path / "input", texts)
    facts = facts_of_passes(work.config, tmp_path / "build", work.directory.tokenizer_model, n_bytes)
    assert facts.keys() == PASSES_OF.keys()
    assert all(rate > 0 for rate in facts.values())

    found = (Build(tmp_path / "build").result("search", 0) / "strings.txt").read_bytes()
    assert found
