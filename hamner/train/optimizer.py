"""AdamW updates fp32 masters, by groups of parameters.

The module's parameters are what matmuls read (bf16 on a GPU); the optimizer owns fp32 masters and
moments and writes the bf16 copy in the same pass (Loshchilov & Hutter 2019, arXiv:1711.05101). With
the Triton kernels it keeps of each master only what the bf16 copy lacks (`split_master`): the same
updates in 2 bytes less a parameter. Nothing waits for the GPU: the clip coefficient stays on the
device, and a step whose loss or gradient norm is not finite is skipped there.
"""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hamner.checkpoint.format import Checkpoint
from hamner.kernels.adamw import clip_coefficient, join_master, split_master
from hamner.model.ops import Ops
from hamner.parallel.engines import Engine
from hamner.parallel.tensors import local

BETAS = (0.9, 0.95)
EPS = 1e-8


class AdamW:
    """The optimizer owns masters and moments of a model's parameters, by name.

    Args:
        model: its matrices are cast to `dtype` in place; vectors (norms, lambdas) stay fp32.
        ops: whose `adamw_` and `global_grad_norm` run.
        dtype: compute dtype of the matrices; fp32 needs no masters.
        weight_decay: of the matrices, none on vectors.
        grad_clip: largest global gradient norm; 0 does not clip.
        engine: which finishes the sums of gradients over processes. With FSDP2 all tensors here are
            DTensors, and each process updates its shards.
    """

    def __init__(
        self,
        model: nn.Module,
        ops: Ops,
        *,
        dtype: torch.dtype,
        weight_decay: float,
        grad_clip: float,
        engine: Engine | None = None,
    ) -> None:
        self.ops, self.weight_decay, self.grad_clip = ops, weight_decay, grad_clip
        self.engine = engine or Engine()
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.is_split = ops.splits_masters and dtype == torch.bfloat16
        self.masters: dict[str, Tensor] = {}
        """fp32, of parameters in another dtype; where they are split, their int16 remainders"""
        self.accumulated: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.ndim < 2 or dtype == torch.float32:
                continue
            if self.is_split:
                parameter.data, self.masters[name] = split_master(parameter.data)
            else:
                self.masters[name] = parameter.data
                parameter.data = parameter.data.to(dtype)
        self.exp_avg, self.exp_avg_sq = (
            {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
            for _ in range(2)
        )
        self.steps = 0

    def master(self, name: str) -> Tensor:
        """The method gives the fp32 weights that updates add up in; a copy where they are split."""
        weight = self.parameters[name].data
        if self.is_split and name in self.masters:
            return join_master(weight, self.masters[name])
        return self.masters.get(name, weight)

    @torch.no_grad()
    def restore(self, saved: Checkpoint) -> None:
        """Model, masters and moments become a checkpoint's, whatever precision it has."""
        # Split masters on the host: the device may have no room for whole ones.
        split = self.masters if self.is_split else {}
        masters = {
            name: torch.empty(parameter.shape) if name in split else self.master(name)
            for name, parameter in self.parameters.items()
        }
        saved.load_model({**masters, **self.buffers})
        saved.load_optimizer(masters, self.exp_avg, self.exp_avg_sq)
        for name, held in self.masters.items():
            weight = masters[name]
            if self.is_split:
                weight, remainder = split_master(weight)
                held.copy_(remainder)
            self.parameters[name].data.copy_(weight)

    @torch.no_grad()
    def accumulate(self) -> None:
        """The gradients of a micro-batch are added to fp32 sums and dropped."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in self.accumulated:
                self.accumulated[name].add_(parameter.grad)
            else:
                # A copy: a CUDA graph overwrites its gradients.
                self.accumulated[name] = parameter.grad.to(torch.float32, copy=True)
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float, loss: Tensor | None = None) -> Tensor:
        """The optimizer updates every parameter from its gradient, or from the accumulated sums.

        Args:
            lr: learning rate.
            loss: 0-d fp32 on the device; the step is skipped if it is not finite.

        Returns:
            The global gradient norm before clipping, 0-d fp32 on the device, NaN if the loss is
            not finite; the step was skipped if the norm is not finite.
        """
        gradients = self.accumulated or {
            name: parameter.grad
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }
        self.steps += 1
        norm = self.engine.grad_norm(self.ops.global_grad_norm, gradients)
        if loss is not None:
            norm = norm + (loss - loss)  # 0, or NaN where the loss is infinite or NaN
        clip = clip_coefficient(norm, self.grad_clip or math.inf)
        # Updated at once are parameters of the same dtypes that all decay or all do not.
        kinds = defaultdict(list)
        for name, gradient in gradients.items():
            parameter = self.parameters[name]
            weight = local(parameter.data)
            state = (
                weight,
                local(self.masters[name]) if name in self.masters else weight,
                local(gradient),
                local(self.exp_avg[name]),
                local(self.exp_avg_sq[name]),
            )
            kinds[parameter.ndim >= 2, *(tensor.dtype for tensor in state)].append(state)
        for (decays, *_), states in kinds.items():
            self.ops.adamw_(
                *zip(*states, strict=True),
                lr=lr,
                betas=BETAS,
                eps=EPS,
                weight_decay=self.weight_decay if decays else 0.0,
                step=self.steps,
                clip_coef=clip,
            )
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        """The gradients are forgotten, accumulated ones too."""
        self.accumulated = {}
        self.drop_last_gradients()

    def drop_last_gradients(self) -> None:
        """The gradients of the last backward pass are forgotten, not the accumulated ones."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict:
        """The state in state.json is the number of updates; the tensors are `state_tensors`."""
        return {"optimizer_steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """The updates are counted on from where `state_dict` was taken."""
        self.steps = state["optimizer_steps"]

    def state_tensors(self) -> dict[str, Tensor]:
        """The method gives every tensor of the state by the name it has in a checkpoint.

        Where masters are split, `join_masters` makes `master.NAME` whole.
        """
        tensors = {f"master.{name}": tensor for name, tensor in self.masters.items()}
        tensors |= {f"exp_avg.{name}": tensor for name, tensor in self.exp_avg.items()}
        return tensors | {f"exp_avg_sq.{name}": t for name, t in self.exp_avg_sq.items()}


def join_masters(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The function replaces each remainder by the fp32 master, as checkpoints have it.

    Args:
        model: the parameters, which are bf16 where there is a remainder.
        optimizer: as `AdamW.state_tensors`.
    """
    whole = dict(optimizer)
    for key, tensor in optimizer.items():
        if tensor.dtype == torch.int16:
            whole[key] = join_master(model[key.removeprefix("master.")], tensor)
    return whole
