"""The linear layers of a model that `--matmul` has in int8, each by its own choice of products.

A linear layer has three matmuls, with two operands each (hamner.kernels.int8_linear). Those of qkv
and o, and of a dense MLP's gate_up and down, can be int8; router, experts, shared ones too, and the
head never are. An operand that loses too much by quantisation goes back to bf16, and its matmul
with it; the others stay.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamner.config.model import ModelConfig
from hamner.kernels.int8_error import SPOTS
from hamner.kernels.int8_handover import Handover
from hamner.kernels.int8_linear import OPERANDS, join_products, products

LINEARS = "qkv", "o", "gate_up", "down"


class Operand(NamedTuple):
    """An operand is one of `OPERANDS` of one linear layer."""

    layer: int
    linear: str
    """one of LINEARS"""
    name: str

    @property
    def matmul(self) -> tuple[int, str, str]:
        """The matmul that it is an operand of is a layer, a linear layer and a product."""
        return self.layer, self.linear, OPERANDS[self.name]


def int8_linears(config: ModelConfig) -> tuple[str, ...]:
    """The function gives the linear layers of a block that can be int8."""
    return LINEARS[:2] if config.is_moe else LINEARS


def norms_after(config: ModelConfig) -> dict[tuple[int, str], tuple[int, str]]:
    """The function maps linear layers to those whose norm reads what they give, and whose backward
    can quantise its gradient; not so where attention is not one op with the norm before it."""
    if config.is_moe:
        return {}
    layers = range(config.num_layers)
    readers = {(layer, "o"): (layer, "gate_up") for layer in layers}
    if not config.use_differential_attention:
        readers |= {(layer, "down"): (layer + 1, "qkv") for layer in layers[:-1]}
    return readers


class Int8Linears:
    """The object says how every linear layer multiplies, and collects what quantisation loses.

    Args:
        config: shape.
        matmul: "int8" or "int8-all".
        device: of the model.
    """

    def __init__(self, config: ModelConfig, matmul: str, device: torch.device | str) -> None:
        names = int8_linears(config)
        self.num_layers, self.products = config.num_layers, products(matmul)
        self.readers = norms_after(config)
        self.linears = [(layer, name) for layer in range(config.num_layers) for name in names]
        self.matmuls = dict.fromkeys(self.linears, matmul)
        self.fallen: frozenset[Operand] = frozenset()
        shape = (len(self.linears), len(OPERANDS), SPOTS, 2)
        self.errors = torch.zeros(shape, device=device, requires_grad=True)
        """backward leaves sums in its gradient"""

    @property
    def operands(self) -> list[Operand]:
        """The operands are in the order of `take_errors`."""
        return [Operand(*linear, name) for linear in self.linears for name in OPERANDS]

    def fall_back(self, operands: Collection[Operand]) -> bool:
        """The matmuls with these operands, and no others, are bf16 from now on; the answer is
        whether that changes any."""
        if self.fallen == frozenset(operands):
            return False
        self.fallen, before = frozenset(operands), self.matmuls
        fallen = {operand.matmul for operand in operands}
        self.matmuls = {
            linear: join_products(p for p in self.products if (*linear, p) not in fallen)
            for linear in self.linears
        }
        return any(
            products(before[linear]) != products(matmul) for linear, matmul in self.matmuls.items()
        )

    def settings(self) -> list[dict[str, dict[str, Any]]]:
        """The method gives, by layer and linear layer, arguments for the ops of a forward pass;
        what is all bf16 has none."""
        by_layer = [{} for _ in range(self.num_layers)]
        for linear, errors in zip(self.linears, self.errors.unbind(), strict=True):
            layer, name = linear
            if self.matmuls[linear] != "bf16":
                by_layer[layer][name] = {"matmul": self.matmuls[linear], "errors": errors}
        # torch.compile follows tensors, and would break its graph for anything else.
        readers = {} if torch.compiler.is_compiling() else self.readers
        for (layer, name), (next_layer, reader) in readers.items():
            maker, norm = by_layer[layer].get(name), by_layer[next_layer].get(reader)
            if maker and norm and "data_gradient" in products(maker["matmul"]):
                maker["takes_from"] = norm["hands_to"] = Handover()
        return by_layer

    def take_errors(self) -> Tensor:
        """The method gives what backward passes since the last call have measured.

        Returns:
            (linears, OPERANDS, 2) fp32: sums of squares, of what quantisation changed and of what
            there was, of a sample of every operand; 0 for those that are not quantised.
        """
        gradient, self.errors.grad = self.errors.grad, None
        if gradient is None:
            gradient = torch.zeros_like(self.errors, requires_grad=False)
        return gradient.sum(dim=2)
