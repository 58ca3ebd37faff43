"""The module keeps keys and values of past tokens, so that decoding computes each token once."""

import torch
from torch import Tensor

from hamner.config.model import ModelConfig
from hamner.kernels.flash_attention import split_qkv


class KVCache:
    """A cache has room for the keys and values of one sequence, in every layer.

    Args:
        capacity: most tokens of the sequence.

    Attributes:
        length: tokens held. The model counts it up; set it lower to forget the last tokens.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.capacity, self.length = config, capacity, 0
        # (layers, 1, capacity, KV, head size)
        shape = (config.num_layers, 1, capacity, config.num_kv_heads, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    def extend(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`extend` puts the keys and values of new tokens behind those that a layer has.

        Args:
            layer: whose keys and values.
            qkv: (1, T, (H + 2 KV) head_size), packed and rotated.

        Returns:
            The new queries (1, T, H, head_size), and all keys and values (1, S, KV, head_size).

        Raises:
            ValueError: the cache has no room for them.
        """
        q, k, v = split_qkv(qkv, self.config.num_attention_heads, self.config.num_kv_heads)
        end = self.length + qkv.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.capacity}")
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return q, self.keys[layer, :, :end], self.values[layer, :, :end]
