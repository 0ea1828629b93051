"""Keys and values of the tokens so far, so that each new token costs one token's work.

Dimensions: B sequences, T new tokens, S tokens the cache has room for, H key/value heads, K d_head.
"""

import torch

from dist_lm.config import ModelConfig


class KVCache:
    """Room for `max_len` tokens of `batch` sequences in every layer.

    Entries are written at their position, and a query sees the keys at positions up to its own. So prompts
    of different lengths are padded on the right and go through in one forward, then each row goes on at its
    own position: what padding left behind lies after the row's position, is never seen, and is overwritten
    in time.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layers, batch, config.kv_heads, max_len, config.d_head)
        self.key_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.value_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.row_B1 = torch.arange(batch, device=device)[:, None]

    def write(self, layer: int, position_BT: torch.Tensor, key_BTHK: torch.Tensor, value_BTHK: torch.Tensor) -> None:
        """Store the new tokens of one layer at their positions."""
        # the two index tensors move to the front, so the indexed part has shape (B, T, H, K)
        self.key_LBHSK[layer][self.row_B1, :, position_BT] = key_BTHK
        self.value_LBHSK[layer][self.row_B1, :, position_BT] = value_BTHK

    def read(self, layer: int, n_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `n_keys` keys and values of one layer, each (B, n_keys, H, K)."""
        key_BHSK, value_BHSK = self.key_LBHSK[layer, :, :, :n_keys], self.value_LBHSK[layer, :, :, :n_keys]
        return key_BHSK.transpose(1, 2), value_BHSK.transpose(1, 2)
