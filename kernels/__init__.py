"""Hand-written Triton kernels for training language models; torch and triton only."""

import os

# Triton 3.9 warns when this is unset and 3.10 turns fusion off. The kernels are written for fused
# multiply-adds: fewer instructions, and one rounding instead of two.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from hamner.kernels.adamw import (
    adamw_,
    clip_coefficient,
    global_grad_norm,
    join_master,
    split_master,
)
from hamner.kernels.cross_entropy import linear_cross_entropy
from hamner.kernels.embedding import tied_embedding
from hamner.kernels.flash_attention import flash_attention, flash_attention_qkv
from hamner.kernels.fused_linear import (
    add_rms_norm_linear,
    add_rms_norm_qkv_rope,
    rms_norm_linear,
    swiglu_linear,
)
from hamner.kernels.grouped_matmul import moe_mlp
from hamner.kernels.int8_handover import Handover
from hamner.kernels.int8_linear import Matmul, int8_linear
from hamner.kernels.int8_matmul import int8_matmul
from hamner.kernels.int8_quantize import Int8Matrix, quantize_int8
from hamner.kernels.moe_routing import Routing, moe_route
from hamner.kernels.muon import muon_apply_, muon_momentum_, orthogonalize_, symmetric_product
from hamner.kernels.norm_attention import add_rms_norm_attention
from hamner.kernels.norm_mlp import add_rms_norm_mlp
from hamner.kernels.qk_norm import qk_norm_rope
from hamner.kernels.rms_norm import add_rms_norm, rms_norm
from hamner.kernels.rope import rope, rope_packed_
from hamner.kernels.router_linear import router_linear
from hamner.kernels.swiglu import swiglu

__all__ = [
    "Handover",
    "Int8Matrix",
    "Matmul",
    "Routing",
    "adamw_",
    "add_rms_norm",
    "add_rms_norm_attention",
    "add_rms_norm_linear",
    "add_rms_norm_mlp",
    "add_rms_norm_qkv_rope",
    "clip_coefficient",
    "flash_attention",
    "flash_attention_qkv",
    "global_grad_norm",
    "join_master",
    "int8_linear",
    "int8_matmul",
    "linear_cross_entropy",
    "moe_mlp",
    "moe_route",
    "muon_apply_",
    "muon_momentum_",
    "orthogonalize_",
    "qk_norm_rope",
    "quantize_int8",
    "rms_norm",
    "rms_norm_linear",
    "rope",
    "rope_packed_",
    "router_linear",
    "split_master",
    "swiglu",
    "swiglu_linear",
    "symmetric_product",
    "tied_embedding",
]
