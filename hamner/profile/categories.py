"""The kind of work a kernel does follows from its name and from the operations around its launch.

Covers Hamner's kernels, cuBLAS, cuDNN, CUTLASS, flash-attn, Inductor's generated Triton kernels
(whose names list the operations they fuse), Liger, NCCL and ATen. Torch-free.
"""

import functools
import re

from hamner.profile.trace import Activity

CATEGORIES = (
    *("matmul", "attention", "norm", "swiglu", "rope", "loss", "optimizer", "routing"),
    *("communication", "other"),
)

# FSDP2 copies lists of tensors for its messages, and optimizers for weights that they keep in two
# precisions, by the same operation.
_COPY_OF_A_LIST = r"multi_tensor.*\bCopy<|_foreach_copy"

# The first that matches decides, so what is special stands before what is common: attention is
# built from CUTLASS matmuls, and optimizers and losses are made of norms and softmaxes.
_RULES = (
    (None, _COPY_OF_A_LIST),  # what is around the launch tells
    # FSDP2 cuts what it sends and puts together what it got with kernels of ATen.
    (
        "communication",
        r"nccl|c10d::|all_?reduce|all_?gather|reduce_?scatter|chunk_cat|split_with_sizes_copy",
    ),
    (
        "attention",
        r"flash_attention|flash_(fwd|bwd)|flash::|flash_attn|flex_attention|fmha|sdpa"
        r"|scaled_dot_product|_efficient_attention|_cudnn_attention|AttentionBackward",
    ),
    (
        "routing",
        r"\b(route|route_backward|scan|scatter|sum_slots)_kernel\b|moe_route|topk|moe_align"
        r"|router_linear",
    ),
    (
        "optimizer",
        r"adamw?(_|\b|Functor)|fused_adam|multi_tensor|_foreach_|optimizer|clip_grad|LpNorm"
        r"|grad_norm|\b(sum_squares|momentum|apply|symmetric_product)_kernel\b|muon",
    ),
    (
        "loss",
        r"cross_entropy|CrossEntropy|nll_loss|NllLoss|log_?softmax|logsumexp|softmax_online"
        r"|\bscale_kernel\b|element_mul_kernel",
    ),
    # Softmax on its own: attention that writes its scores.
    ("attention", r"softmax"),
    ("norm", r"(rms|layer)_?norm|\bsum_partials_kernel\b|rsqrt|fused_\w*_pow_"),
    ("rope", r"rope|rotary|fused_\w*(neg\w*_cat|cat\w*_neg|_cos_|_sin_)"),
    ("swiglu", r"swiglu|silu|fused_\w*sigmoid"),
    (
        "matmul",
        r"gemm|nvjet|cutlass|cublas|xmma|splitk|gemv|grouped_mm|grouped_matmul_kernel"
        r"|\bgate_up_kernel\b|\bweight_grad_kernel\b|triton_tem_fused"
        r"|int8_matmul|quantize_(int8|rows|columns)|quantization_error|\bcolumn_maxima_kernel\b"
        r"|aten::(mm|addmm|bmm|baddbmm|matmul|linear|dot|mv)\b|mkldnn_linear",
    ),
)


@functools.cache
def category_of_name(name: str) -> str | None:
    """The function finds the category by a kernel's or an operation's name, or None."""
    return next(
        (category for category, rule in _RULES if re.search(rule, name, re.IGNORECASE)), None
    )


def is_collective(activity: Activity) -> bool:
    """The function says whether it is a message between GPUs itself, not a copy made for one."""
    return "nccl" in activity.name.lower()


def category_of(activity: Activity) -> str:
    """The function finds the category of work by its own name, else by what launched it."""
    callers = [] if activity.caller is None else [c.name for c in activity.caller.chain()]
    found = next(filter(None, map(category_of_name, [activity.name, *callers])), None)
    if found is None and "graph" in callers and re.search(_COPY_OF_A_LIST, activity.name):
        # Of a CUDA graph of ours no operations are known, but it holds no optimizer.
        return "communication"
    return found or "other"
