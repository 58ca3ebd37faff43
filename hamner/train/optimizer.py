"""AdamW and Muon update fp32 masters, by groups of parameters.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) has the embedding, the head, the router and all
vectors; the hidden matrices have it too, or with `--optimizer muon` Muon (hamner.kernels.muon), on
each logical matrix by itself: q, k, v, gate, up and every expert.

The module's parameters are what matmuls read (bf16 on a GPU); the optimizer owns fp32 masters and
moments and writes the bf16 copy in the same pass. With the Triton kernels it keeps of each master
only what the bf16 copy lacks (`split_master`): the same updates in 2 bytes less a parameter.
Nothing waits for the GPU: the clip coefficient stays on the device, and a step whose loss or
gradient norm is not finite is skipped there.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hamner.checkpoint.format import Checkpoint
from hamner.config.model import ModelConfig
from hamner.config.train import TrainConfig
from hamner.kernels.adamw import clip_coefficient, join_master, split_master
from hamner.model.ops import Ops
from hamner.parallel.engines import Engine
from hamner.parallel.tensors import fill, is_sharded, local, whole

EPS = 1e-8
Kinds = list[list[str]]
"""names of parameters that differ only in their layer, kind by kind"""


class Optimizer:
    """The optimizer owns masters and moments of a model's parameters, by name.

    Args:
        model: its matrices are cast to `dtype` in place; vectors (norms, lambdas) stay fp32.
        ops: whose optimizer functions run.
        config: the run, whose recipe says how each group of parameters is updated.
        dtype: compute dtype of the matrices, and of Muon's updates; fp32 needs no masters.
        engine: which finishes the sums of gradients over processes. With FSDP2 all tensors here are
            DTensors, and each process updates its shards.
    """

    def __init__(
        self,
        model: nn.Module,
        ops: Ops,
        config: TrainConfig,
        *,
        dtype: torch.dtype,
        engine: Engine | None = None,
    ) -> None:
        self.ops, self.config, self.update_dtype = ops, config, dtype
        self.engine = engine or Engine()
        dtype = self.engine.parameter_dtype or dtype
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
        self.exp_avg = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in self.parameters.items()
        }
        """first moments, of Muon's matrices the momenta"""
        self.exp_avg_sq = {
            name: torch.zeros_like(moment)
            for name, moment in self.exp_avg.items()
            if group_of(name, moment) != "hidden" or config.optimizer == "adamw"
        }
        """second moments, which Muon has none of"""
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
            lr: learning rate of the hidden matrices; the other groups' are in proportion.
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
        clip = clip_coefficient(norm, self.config.grad_clip or math.inf)
        self._step_adamw({n: g for n, g in gradients.items() if n in self.exp_avg_sq}, lr, clip)
        for kinds in muon_groups({n: g for n, g in gradients.items() if n not in self.exp_avg_sq}):
            self._step_muon(gradients, kinds, lr=lr, clip=clip)
        self.drop_gradients()
        return norm

    def _step_adamw(self, gradients: Mapping[str, Tensor], lr: float, clip: Tensor) -> None:
        """AdamW updates at once parameters of one group and of the same dtypes."""
        kinds = defaultdict(list)
        for name, gradient in gradients.items():
            weight = local(self.parameters[name].data)
            state = (
                weight,
                local(self.masters[name]) if name in self.masters else weight,
                local(gradient),
                local(self.exp_avg[name]),
                local(self.exp_avg_sq[name]),
            )
            kinds[group_of(name, weight), *(tensor.dtype for tensor in state)].append(state)
        config = self.config
        for (group, *_), states in kinds.items():
            self.ops.adamw_(
                *zip(*states, strict=True),
                lr=lr * config.group_lrs[group] / config.lr,
                betas=(config.beta1, config.beta2),
                eps=EPS,
                weight_decay=config.group_decays[group],
                step=self.steps,
                clip_coef=clip,
            )

    def _step_muon(
        self, gradients: Mapping[str, Tensor], kinds: Kinds, *, lr: float, clip: Tensor
    ) -> None:
        """Muon updates at once the matrices of several kinds, of all layers.

        Where processes hold shards, each takes its own into the momentum, gathers the updates,
        makes them orthogonal as the others do, and applies its part.
        """
        names = list(itertools.chain(*kinds))
        weights = {name: self.parameters[name].data for name in names}
        sharded = is_sharded(weights[names[0]])
        how = {"dtype": self.update_dtype}
        if sharded:
            shards = [[torch.empty_like(weights[name], **how) for name in kind] for kind in kinds]
        else:
            firsts = [weights[kind[0]] for kind in kinds]
            shards = updates = [
                first.new_empty((len(kind), *first.shape), **how)
                for first, kind in zip(firsts, kinds, strict=True)
            ]
        parts = [local(shard) for shard in itertools.chain(*shards)]
        self.ops.muon_momentum_(
            [local(gradients[name]) for name in names],
            [local(self.exp_avg[name]) for name in names],
            parts,
            beta=self.config.momentum,
            clip_coef=clip,
        )
        if sharded:
            updates = [torch.stack([whole(shard) for shard in kind]) for kind in shards]
        self.ops.orthogonalize_(
            [update.view(-1, *update.shape[-2:]) for update in updates],
            [logical_rows(kind[0], self.config.model) for kind in kinds],
        )
        if sharded:
            pairs = zip(itertools.chain(*shards), itertools.chain(*updates), strict=True)
            for shard, update in pairs:
                fill(shard, update)
        params = [local(weights[name]) for name in names]
        self.ops.muon_apply_(
            params,
            [local(self.masters[n]) for n in names] if names[0] in self.masters else params,
            parts,
            lr=lr,
            weight_decay=self.config.weight_decay,
            clip_coef=clip,
        )

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


def group_of(name: str, parameter: Tensor) -> str:
    """A parameter is one of "hidden", "embedding" and "vector"; see `RecipeConfig`."""
    if parameter.ndim < 2:
        return "vector"
    return "embedding" if name.split(".")[-2] in ("embed", "lm_head", "router") else "hidden"


def muon_groups(gradients: Mapping[str, Tensor]) -> list[Kinds]:
    """The function groups kinds that together have no more elements than the largest one, so that
    their matrices share launches in the memory that the largest needs.

    Args:
        gradients: of all hidden matrices, by name; a group's are of one dtype.
    """
    kinds, sizes = defaultdict(list), Counter()
    for name, gradient in gradients.items():
        kind = str(gradient.dtype), name.split(".", 2)[2]
        kinds[kind].append(name)
        sizes[kind] += gradient.numel()
    groups: list[list[tuple[str, str]]] = []
    for kind in sorted(kinds, key=lambda kind: (kind[0], -sizes[kind])):
        has_room = groups and sizes[kind] + sum(sizes[k] for k in groups[-1]) <= max(sizes.values())
        if has_room and groups[-1][0][0] == kind[0]:
            groups[-1].append(kind)
        else:
            groups.append([kind])
    return [[kinds[kind] for kind in group] for group in groups]


def logical_rows(name: str, model: ModelConfig) -> tuple[int, ...]:
    """The logical matrices that one hidden parameter packs have this many rows."""
    d, inner = model.hidden_size, model.expert_intermediate_size
    kv = model.num_kv_heads * model.head_size
    rows = {
        "qkv_proj.weight": (model.qkv_size - 2 * kv, kv, kv),
        "o_proj.weight": (d,),
        "gate_up_proj.weight": (inner, inner),
        "gate_up_weight": (inner, inner),
        "down_proj.weight": (d,),
        "down_weight": (d,),
    }
    found = next(rows for ending, rows in rows.items() if name.endswith(ending))
    if ".shared." in name and len(found) == 2:
        return tuple(model.num_shared_experts * size for size in found)
    return found


def join_masters(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The function replaces each remainder by the fp32 master, as checkpoints have it.

    Args:
        model: the parameters, which are bf16 where there is a remainder.
        optimizer: as `Optimizer.state_tensors`.
    """
    whole = dict(optimizer)
    for key, tensor in optimizer.items():
        if tensor.dtype == torch.int16:
            whole[key] = join_master(model[key.removeprefix("master.")], tensor)
    return whole
