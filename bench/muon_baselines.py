"""Optimizers that Hamner's Muon is measured against, on the same weights and gradients.

    Hamner          hamner.train.optimizer.Optimizer, as the step calls it
    TorchMuon       torch.optim.Muon, a matrix at a time, with PyTorch's fused AdamW for the rest
    BatchedQuintics as modded-nanogpt and Dion arrange it: weights of one shape in one stack over
                    layers, element-wise work compiled, five quintic Newton-Schulz steps on X in
                    bfloat16 (Jordan et al. 2024), X X^T and b A + c A A each computed by half and
                    mirrored, with the same fused AdamW for the rest
    GramNewtonSchulz the same with the iteration of Dao AI Lab (dao-lab.ai/blog/2026/gram-newton-
                    schulz): matrices that are not square go through five Polar Express steps in
                    float16 on their Gram matrix, with X and it computed anew after two

All clip the global gradient norm at 1.0 and update each logical matrix (q, k, v, o, gate, up, down)
by itself. Theirs have fp32 weights and gradients, as their users have; ours bf16 weights with split
masters and bf16 gradients.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bench import scale
from bench.baselines import GRAD_CLIP, plain_model
from hamner.config.train import TrainConfig
from hamner.kernels.muon import RMS, symmetric_product, symmetric_product_reference
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.ops import build_ops
from hamner.train.optimizer import EPS, Optimizer, group_of, logical_rows

LR = 0.02
QUINTICS = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
"""Amsel et al. 2025, arXiv:2505.16932, for singular values from 0.001"""
RESTART = 2


symmetric = symmetric_product_reference if scale.SMOKE else symmetric_product


def quintics(x: Tensor, coefficients: Iterable[tuple[float, float, float]] = QUINTICS) -> Tensor:
    """The function gives X after steps X <- a X + (b A + c A A) X, A = X X^T.

    Args:
        x: (B, m, n), m <= n, of a Frobenius norm of 1 each.
    """
    for a, b, c in coefficients:
        gram = symmetric(x)
        polynomial = symmetric(gram, product_factor=c, addend=gram, addend_factor=b)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def gram_newton_schulz(x: Tensor) -> Tensor:
    """The function gives X after five Polar Express steps.

    With Z = b G + c G G and Q the product of all a I + Z so far, a step is

        Q <- Q (a I + Z),   G <- (a I + Z) G (a I + Z)

    and X <- Q X, G = X X^T, Q = I after `RESTART` steps, as rounding parts G from X.

    Args:
        x: (B, m, n), m <= n, of a Frobenius norm of 1 each.
    """
    dtype = x.dtype
    # Rounding must not lift a singular value above 1, where the first step carries it away.
    x = (x / 1.02).to(torch.float32 if scale.SMOKE else torch.float16)
    if x.shape[1] == x.shape[2]:
        return quintics(x, POLAR_EXPRESS).to(dtype)
    for steps in (POLAR_EXPRESS[:RESTART], POLAR_EXPRESS[RESTART:]):
        gram, q = symmetric(x), None
        for number, (a, b, c) in enumerate(steps, 1):
            factor = symmetric(
                gram, product_factor=c, addend=gram, addend_factor=b, identity_factor=a
            )
            q = factor if q is None else q @ factor
            if number < len(steps):
                gram = factor @ gram @ factor
        x = q @ x
    return x.to(dtype)


class Logical(NamedTuple):
    """A logical matrix is some rows of a parameter."""

    parameter: str
    start: int
    end: int

    def of(self, packed: Tensor) -> Tensor:
        """The method gives its rows of the parameter, or of what has that shape."""
        return packed[self.start : self.end]


class Contender(Protocol):
    """A contender updates all parameters of a model from gradients that stay the same."""

    def update(self) -> object:
        """The method takes one optimizer step, without waiting for the GPU."""
        ...

    def weight(self, matrix: Logical) -> Tensor:
        """The method gives a copy of a logical matrix's fp32 weights."""
        ...


def logical_matrices(config: TrainConfig, name: str, parameter: Tensor) -> list[Logical]:
    """The function names the logical matrices of a hidden parameter; none of another parameter."""
    if group_of(name, parameter) != "hidden":
        return []
    ends = itertools.accumulate(logical_rows(name, config.model), initial=0)
    return [Logical(name, start, end) for start, end in itertools.pairwise(ends)]


def gradient(name: str, parameter: Tensor) -> Tensor:
    """The function draws a parameter's gradient, which is the same for all contenders: as bf16 has
    it, in fp32."""
    seed = sum(ord(letter) << (index % 24) for index, letter in enumerate(name))
    generator = torch.Generator(parameter.device).manual_seed(seed)
    drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device)
    return (1e-3 * drawn).to(scale.dtype()).float()


class Hamner:
    """Hamner's optimizer has packed parameters.

    Args:
        config: whose optimizer, model and recipe.
    """

    def __init__(self, config: TrainConfig) -> None:
        shape = AttentionShape.of_model(
            config.model,
            device=torch.device(scale.device()),
            dtype=scale.dtype(),
            seq_len=config.seq_len,
            micro_batch_size=1,
        )
        ops = build_ops(scale.pick("triton", "torch"), get_attention("sdpa", shape))
        self.model = plain_model(config.model)
        self.optimizer = Optimizer(self.model, ops, config, dtype=scale.dtype())
        self.gradients = {
            name: gradient(name, parameter).to(parameter.dtype)
            for name, parameter in self.optimizer.parameters.items()
        }

    def update(self) -> None:
        for name, parameter in self.optimizer.parameters.items():
            parameter.grad = self.gradients[name]
        self.optimizer.step(LR)

    def weight(self, matrix: Logical) -> Tensor:
        return matrix.of(self.optimizer.master(matrix.parameter)).clone()


def _parameter(weight: Tensor, grad: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter.grad = grad
    return parameter


class _WithAdamW:
    """The embedding and the vectors have PyTorch's fused AdamW, the hidden matrices a subclass's
    optimizer, all of them one clipping."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.hidden: dict[Logical, tuple[Tensor, Tensor]] = {}
        """weight and gradient"""
        self.gradients: list[Tensor] = []
        rest = []
        for name, parameter in plain_model(config.model).named_parameters():
            grad, matrices = gradient(name, parameter), logical_matrices(config, name, parameter)
            for matrix in matrices:
                self.hidden[matrix] = matrix.of(parameter.data), matrix.of(grad)
            if not matrices:
                rest.append(_parameter(parameter.data, grad))
                self.gradients.append(grad)
        self.adamw = torch.optim.AdamW(
            rest,
            lr=LR,
            betas=(config.beta1, config.beta2),
            eps=EPS,
            weight_decay=config.weight_decay,
            fused=not scale.SMOKE,
        )

    def clip(self) -> None:
        """The gradients are scaled to a global norm of at most `GRAD_CLIP`."""
        norms = torch._foreach_norm(self.gradients)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        torch._foreach_mul_(self.gradients, (GRAD_CLIP / (norm + 1e-6)).clamp(max=1.0))


class TorchMuon(_WithAdamW):
    """PyTorch's Muon has a parameter a logical matrix."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.parameters = {
            matrix: _parameter(weight.clone(), grad.clone())
            for matrix, (weight, grad) in self.hidden.items()
        }
        self.gradients += [parameter.grad for parameter in self.parameters.values()]
        self.muon = torch.optim.Muon(
            self.parameters.values(),
            lr=LR,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    def update(self) -> None:
        self.clip()
        self.adamw.step()
        self.muon.step()

    def weight(self, matrix: Logical) -> Tensor:
        return self.parameters[matrix].detach().clone()


class BatchedQuintics(_WithAdamW):
    """The logical matrices of one shape are one stack."""

    iterate = staticmethod(quintics)

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        members = defaultdict(list)
        for matrix, (weight, grad) in self.hidden.items():
            members[weight.shape].append((matrix, weight, grad))
        self.stacks: list[tuple[Tensor, Tensor, Tensor]] = []
        """weights, gradients, momenta, (matrices, rows, columns) fp32"""
        self.views: dict[Logical, Tensor] = {}
        for stack in members.values():
            matrices, weights, grads = zip(*stack, strict=True)
            weight, grad = torch.stack(weights), torch.stack(grads)
            self.views |= dict(zip(matrices, weight, strict=True))
            self.stacks.append((weight, grad, torch.zeros_like(weight)))
            self.gradients.append(grad)
        self.direction = scale.compiled(_direction)
        self.apply = scale.compiled(_apply)

    @torch.no_grad()
    def update(self) -> None:
        self.clip()
        self.adamw.step()
        for weight, grad, momentum in self.stacks:
            x = self.direction(grad, momentum, self.config.momentum)
            x = self.iterate(x if x.shape[1] <= x.shape[2] else x.mT)
            x = x if x.shape == weight.shape else x.mT
            factor = LR * RMS * math.sqrt(max(weight.shape[1:]))
            self.apply(weight, x, factor, LR * self.config.weight_decay)

    def weight(self, matrix: Logical) -> Tensor:
        return self.views[matrix].clone()


class GramNewtonSchulz(BatchedQuintics):
    """The stacks have another iteration."""

    iterate = staticmethod(gram_newton_schulz)


def _direction(grad: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """The function takes the gradients into the momenta, and gives Nesterov's directions divided by
    their norms."""
    momentum.lerp_(grad, 1 - beta)
    direction = grad.lerp(momentum, beta)
    norm = direction.norm(dim=(1, 2), keepdim=True) + 1e-7
    return (direction / norm).to(scale.dtype())


def _apply(weight: Tensor, update: Tensor, factor: float, decay: float) -> None:
    weight.copy_(weight - decay * weight - factor * update.float())


CONTENDERS: dict[str, type[Contender]] = {
    "hamner": Hamner,
    "torch.optim.Muon": TorchMuon,
    "batched quintics": BatchedQuintics,
    "Gram Newton-Schulz": GramNewtonSchulz,
}
