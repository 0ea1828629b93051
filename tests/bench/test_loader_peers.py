"""Loaders of other libraries in the benchmark of the loader: absent ones are named, and all tokens are read."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dist_lm.bench import loader, loader_peers
from dist_lm.bench.loader_peers import BATCH, PEERS

SEQ_LEN = 16


def samples() -> np.ndarray:
    """Returns 3 batches of samples, all of whose tokens differ."""
    n_tokens = 3 * BATCH * (SEQ_LEN + 1)
    return loader_peers.samples_of(np.arange(n_tokens + 1, dtype=np.uint16), SEQ_LEN)


def test_a_peer_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds an absent peer that is an error, or is left out of the table."""
    monkeypatch.setattr(loader_peers, "find_spec", lambda module: None if module == "streaming" else object())
    assert loader_peers.why_not("litdata") is None

    case = loader.cases([], quick=True)[1]
    assert set(PEERS) - set(case.variants) == {"mosaicml-streaming"}
    groups = [case.variants[name] for name in (loader.CROP, *PEERS) if name in case.variants]
    assert len(set(groups)) == len(PEERS), "the threads of a peer count as time of another variant"
    absent = [comparison.peer_name for comparison in case.comparisons if comparison.peer_name]
    assert absent == ["mosaicml-streaming: not installed: pip install mosaicml-streaming"]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_yields_every_sample_once_in_another_order(name: str, tmp_path: Path) -> None:
    """Finds a peer that is slow or fast because it reads other tokens, or does not shuffle."""
    if reason := loader_peers.why_not(name):
        pytest.skip(f"{name}: {reason}")
    epoch = loader_peers.rows_of(name, tmp_path / "peer", samples())

    for _ in range(2):
        rows = np.stack(list(epoch()))
        assert rows.dtype == np.uint16
        assert (rows != samples()).any()
        assert (rows[rows[:, 0].argsort()] == samples()).all()


def test_batches_hold_inputs_and_the_tokens_after_them() -> None:
    """Finds batches of another shape or type than those of the crop, and an epoch that ends the reading."""
    batches = loader_peers.batches_of(loader_peers.epochs(lambda: iter(samples())))
    for inputs, targets in islice(batches, 7):
        assert inputs.shape == targets.shape == (BATCH, SEQ_LEN)
        assert str(inputs.dtype) == str(targets.dtype) == "torch.int64"
        assert (targets == inputs + 1).all()
