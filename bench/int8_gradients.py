"""What int8 does to every gradient of a step, beside what bf16 does: cosine and signal-to-noise.

    python -m bench.int8_gradients --output FILE.jsonl --option a
    python -m bench.int8_gradients --output FILE.jsonl --checkpoint runs/a

The same weights, rounded to bf16, and the same rows go through plain torch in fp32, which is the
truth, and through the kernels in bf16, int8 and int8-all. Two controls have to fail where int8's
scales were chosen for a reason: one scale for a whole tensor of down's operands, and weight
gradients with one scale a channel over all tokens. With outliers (all arms alike, and fp32 too):

    a few channels of gate and of up are 10 times as large, so that down's input has channels some
    100 times as large as the others (SwiGLU's own kind, arXiv:2409.12517), and down's columns as
    much smaller; and behind the last block the gradients of one token in 1,024 are 100 times as
    large.

Against fp32 the noise of int8's other matmuls hides what quantising the weight gradients adds. But
int8 has weight gradients in bf16 of the same operands that int8-all and its control quantise, so
these two are held against int8 too, which shows what they add; that control's verdict rests on it.

Each line of FILE has the numbers of one arm, cosine and signal-to-noise ratio in dB,
20 log10(|g| / |g' - g|): in `gradients` of every parameter against fp32, in `added` of the weights
of linear layers against int8.
"""

import contextlib
import gc
import importlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
import tyro
from torch import Tensor

from bench.conditions import conditions
from hamner.checkpoint.run_folder import append_record
from hamner.checkpoint.saved_model import SavedModel, find_saved_model
from hamner.cli import FLAG_RULES, run_command
from hamner.config.options import for_option
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.files import require_writable
from hamner.kernels import add_rms_norm_linear, swiglu
from hamner.kernels.int8_matmul import int8_matmul
from hamner.kernels.int8_quantize import GROUP, LARGEST, Int8Matrix, quantize_int8
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.int8 import Int8Linears
from hamner.model.ops import build_ops
from hamner.model.transformer import Transformer
from hamner.train.data import open_loader

COMMAND = "python -m bench.int8_gradients"
ONE_SCALE, NO_CHUNKS = "one scale on down", "no chunks"
"""the controls of int8 and of int8-all"""
ARMS = ("bf16", "int8", "int8-all", ONE_SCALE, NO_CHUNKS)
CHANNEL_FACTOR, TOKEN_FACTOR = 10.0, 100.0
"""how much larger outliers are: rows of gate and of up, and gradients of tokens"""
OUTLIER_CHANNELS, OUTLIER_TOKENS = 3, 1024
"""so many channels, and one token of so many"""
LINEAR_OPS = "norm_attention", "linear", "norm_mlp"
"""ops with a linear layer's weight"""
PROJECTION = "_proj.weight"
"""names of linear layers' weights end so"""
ADDING = "int8-all", NO_CHUNKS
"""arms that differ from int8 in their weight gradients only"""
FAILS_DB = 3.0
"""a control has failed visibly if it is noisier by so much"""

Table = dict[str, dict[str, float]]
"""of `compare`"""


@dataclass(frozen=True)
class GradientsConfig:
    """Hold every gradient of int8 against fp32, beside bf16's."""

    output: Path
    """*.jsonl to which results are appended"""
    checkpoint: Path | None = None
    """run, or one of its checkpoints, whose weights to take; None: initial ones"""
    option: str = "a"
    """of the initial weights"""
    data: tuple[str, ...] = ("builtin",)
    """SPEC ... of the rows, as for hamner.train"""
    rows: int = 4
    """sequences"""
    seed: int = 0
    """of initial weights, and of the rows"""


def one_scale(x: Tensor) -> Int8Matrix:
    """The function quantises a matrix with one scale for all of it."""
    scale = x.abs().amax().float().clamp(min=1e-30) / LARGEST.value
    values = (x.float() / scale).round().to(torch.int8)
    return Int8Matrix(values, scale.expand(1, len(x)).contiguous())


class _OneScaleLinear(torch.autograd.Function):
    """The function multiplies forward and for the data gradient operands with one scale each."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        rows = one_scale(h.reshape(-1, h.shape[-1]))
        return int8_matmul(rows, one_scale(weight), h.dtype).view(*h.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        rows = d_out.reshape(-1, len(weight))
        columns = one_scale(weight.T.contiguous())
        d_h = int8_matmul(one_scale(rows), columns, h.dtype).view(h.shape)
        return d_h, torch.mm(rows.T, h.reshape(-1, h.shape[-1]))


def one_scale_linear(h: Tensor, weight: Tensor) -> Tensor:
    """The op gives h (..., in) times weight (out, in), every int8 operand with one scale."""
    return _OneScaleLinear.apply(h, weight)


def one_scale_mlp(*inputs: Tensor, eps: float, recompute: bool, **int8) -> tuple[Tensor, Tensor]:
    """The op is `Ops.norm_mlp` whose down has one scale for each of its operands."""
    *norm, down_weight = inputs
    how = {name: int8[f"gate_up_{name}"] for name in ("matmul", "errors")}
    how |= {"eps": eps, "recompute": recompute}
    gate_up, stream = add_rms_norm_linear(*norm, grouped_gradient=True, **how)
    return one_scale_linear(swiglu(gate_up), down_weight), stream


def _weight_gradient_without_chunks(d_out: Tensor, x: Tensor, matmul: str) -> Tensor:
    operands = (quantize_int8(y.contiguous(), transposed=True) for y in (d_out, x))
    return int8_matmul(*operands, d_out.dtype)


@contextlib.contextmanager
def without_chunks() -> Iterator[None]:
    """Weight gradients have one scale a channel in this context."""
    with contextlib.ExitStack() as stack:
        for name in ("int8_linear", "fused_linear"):
            # An attribute of hamner.kernels of that name is a function.
            module = importlib.import_module(f"hamner.kernels.{name}")
            patch = mock.patch.object(module, "weight_gradient", _weight_gradient_without_chunks)
            stack.enter_context(patch)
        yield


@torch.no_grad()
def add_outliers(model: Transformer) -> None:
    """The function makes channels of gate and up large, and down's columns as much smaller."""
    for layer in model.layers:
        gate_up, down = layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight
        inner = down.shape[1]
        channels = torch.arange(OUTLIER_CHANNELS, device=down.device) * (inner // OUTLIER_CHANNELS)
        for rows in (channels, inner + channels):
            gate_up[rows] *= CHANNEL_FACTOR
        down[:, channels] /= CHANNEL_FACTOR**2


def _enlarge_some(_module, _inputs, outputs) -> tuple:
    """The hook of the last block enlarges the gradients of some tokens that arrive there."""
    *tensors, routing = outputs
    views = []
    for tensor in tensors:
        factors = tensor.new_ones(*tensor.shape[:2], 1)
        # Counted through all rows, however short they are; of 257 tokens, one.
        factors.view(-1)[OUTLIER_TOKENS // 4 :: OUTLIER_TOKENS] = TOKEN_FACTOR
        # The block itself may read the tensor, but not the view.
        view = tensor.view_as(tensor)
        view.register_hook(lambda d, factors=factors: d * factors)
        views.append(view)
    return *views, routing


def build(
    config: TrainConfig, arm: str, *, device: torch.device, saved: SavedModel | None, outliers: bool
) -> Transformer:
    """The function builds an arm's model, or for "fp32" the one that is the truth."""
    is_exact = arm == "fp32"
    dtype = torch.bfloat16 if device.type == "cuda" and not is_exact else torch.float32
    asked = {"seq_len": config.seq_len, "micro_batch_size": 1, "device": device, "dtype": dtype}
    shape = AttentionShape.of_model(config.model, **asked)
    attention = get_attention("sdpa", shape)
    ops = build_ops("torch" if is_exact or device.type == "cpu" else "triton", attention)
    if device.type == "cpu" and not is_exact:
        # The rest would take minutes in Triton's interpreter.
        kernels = build_ops("triton", attention)
        ops = replace(ops, **{name: getattr(kernels, name) for name in LINEAR_OPS})
    if arm == ONE_SCALE:
        ops = replace(ops, norm_mlp=one_scale_mlp)
    with torch.device("meta"):
        model = Transformer(config.model, ops)
    model.to_empty(device=device)
    if saved is None:
        model.initialize(config.seed)
    else:
        saved.checkpoint.load_model(model.state_dict())
    if outliers:
        add_outliers(model)
        model.layers[-1].register_forward_hook(_enlarge_some)
    for matrix in model.matrices():
        matrix.data = matrix.data.bfloat16().to(dtype)
    matmul = {ONE_SCALE: "int8", NO_CHUNKS: "int8-all"}.get(arm, arm)
    if matmul.startswith("int8"):
        model.int8 = Int8Linears(config.model, matmul, device)
    return model


def gradients(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    """The function gives every parameter's gradient of the mean loss, fp32 on the CPU."""
    device = model.embed.weight.device
    model(batch.inputs.to(device), batch.targets.to(device)).loss.backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def compare(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Table:
    """The function gives cosine and signal-to-noise ratio in dB of every gradient in `exact`."""
    table = {}
    for name, truth in exact.items():
        x, y = found[name].double().flatten(), truth.double().flatten()
        noise = (x - y).norm().clamp(min=1e-300)
        cosine = torch.dot(x, y) / (x.norm() * y.norm())
        table[name] = {
            "cosine": round(cosine.item(), 7),
            "snr_db": round(20 * torch.log10(y.norm() / noise).item(), 2),
        }
    return table


def kind_of(name: str) -> str:
    """The function gives the kind of a parameter: its name without the layer."""
    return ".".join(part for part in name.split(".") if not part.isdecimal())


class Measured(NamedTuple):
    """Of an arm's gradients there are two tables."""

    gradients: Table
    """against fp32"""
    added: Table | None
    """of the weights of linear layers, against int8; None but for `ADDING`"""


def measure(
    config: TrainConfig,
    batch: Batch,
    device: torch.device,
    saved: SavedModel | None,
    *,
    outliers: bool,
) -> Iterator[tuple[str, Measured]]:
    """The iterator gives each arm with what was measured of it."""
    how = {"device": device, "saved": saved, "outliers": outliers}
    exact = gradients(build(config, "fp32", **how), batch)
    linear_layers: dict[str, Tensor] = {}
    for arm in ARMS:
        with without_chunks() if arm == NO_CHUNKS else contextlib.nullcontext():
            found = gradients(build(config, arm, **how), batch)
        if arm == "int8":
            linear_layers = {name: g for name, g in found.items() if name.endswith(PROJECTION)}
        added = compare(found, linear_layers) if arm in ADDING else None
        yield arm, Measured(compare(found, exact), added)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def summarize(arms: dict[str, Measured]) -> list[str]:
    """The lines have, by kind of parameter, each arm's median over the layers and its worst, below
    them what its weight gradients add, and at the end whether the controls failed."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in next(iter(arms.values())).gradients:
        kinds[kind_of(name)].append(name)
    lines = []
    for kind, names in kinds.items():
        rows = [(arm, measured.gradients) for arm, measured in arms.items()]
        if kind.endswith(PROJECTION):
            rows += [(f"{arm}, added", arms[arm].added) for arm in ADDING]
        for label, table in rows:
            noise, cosines = ([table[n][k] for n in names] for k in ("snr_db", "cosine"))
            lines.append(
                f"{kind:40} {label:18} {median(noise):6.1f} dB (worst {min(noise):6.1f}), "
                f"cosine {median(cosines):.5f} (worst {min(cosines):.5f})"
            )
    for control, design, table, noisier, kind in (
        (ONE_SCALE, "int8", "gradients", "noisier than", "layers.mlp.gate_up_proj.weight"),
        (NO_CHUNKS, "int8-all", "added", "more noise added than by", "layers.mlp.down_proj.weight"),
    ):
        ours, controls = (getattr(arms[arm], table) for arm in (design, control))
        lost = median(ours[name]["snr_db"] - controls[name]["snr_db"] for name in kinds[kind])
        verdict = "fails visibly" if lost >= FAILS_DB else "DOES NOT FAIL"
        lines.append(f"control, {control}: {verdict}, {lost:.1f} dB {noisier} {design} ({kind})")
    return lines


def find_device() -> torch.device:
    """The function gives the GPU, or the CPU for Triton's interpreter.

    Raises:
        UserError: there is neither.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"{COMMAND} needs a GPU; without one set TRITON_INTERPRET=1, which takes minutes for a "
            "small model"
        )
    return torch.device("cpu")


def main(args: list[str]) -> int:
    """The command measures with and without outliers, and prints the tables."""
    flags = tyro.cli(GradientsConfig, args=args, registry=FLAG_RULES, prog=COMMAND)
    require_writable(flags.output, "--output")
    saved = find_saved_model(flags.checkpoint) if flags.checkpoint else None
    config = saved.config if saved else for_option(flags.option)
    if config.model.is_moe:
        name = f"--checkpoint {flags.checkpoint}" if saved else f"--option {flags.option}"
        raise UserError(f"{name}: a mixture has no down whose input can be int8; give a dense one")
    if flags.rows < 1 or flags.rows * config.seq_len <= GROUP.value:
        raise UserError(
            f"--rows {flags.rows}: weight gradients have a scale each {GROUP.value} tokens, which "
            f"shows with more than that; a row has {config.seq_len}"
        )
    device = find_device()
    # The run's own micro-batch need not divide these rows.
    batch = {"batch_size": flags.rows, "micro_batch_size": None}
    config = replace(config, data=flags.data, seed=flags.seed, **batch)
    tokenizer = saved.tokenizer if saved else load_tokenizer("builtin", config.model.vocab_size)
    with contextlib.closing(open_loader(config, tokenizer, False)) as loader:
        batch = loader.next_batch()
    for outliers in (False, True):
        found = {}
        for arm, measured in measure(config, batch, device, saved, outliers=outliers):
            found[arm] = measured
            row = {"arm": arm, "outliers": outliers, **measured._asdict()}
            row |= {"option": config.option, "checkpoint": flags.checkpoint and saved.name}
            row |= {"tokens": batch.inputs.numel(), "conditions": conditions()}
            append_record(flags.output, row)
        print(
            f"\n{'with' if outliers else 'without'} outliers, {saved.name if saved else 'initial'}"
        )
        print("\n".join(summarize(found)), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
