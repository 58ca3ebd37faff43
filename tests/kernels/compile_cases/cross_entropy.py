"""The softmax over a row and the scaling in backward compile at the options' vocabularies."""

from hamner.kernels.cross_entropy import (
    CONFIGS,
    SCALE_BLOCK,
    SCALE_WARPS,
    cross_entropy_kernel,
    scale_kernel,
)
from hamner.kernels.launch import CAPABILITIES
from tests.kernels.compile_gate import CompileCase

VOCABULARIES = (4096, 49152)


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for case in (
            *(
                _softmax(capability, vocabulary, write_gradient)
                for vocabulary in VOCABULARIES
                for write_gradient in (False, True)
            ),
            _scale(capability, "*bf16"),
            _scale(capability, "*fp32"),
        )
    ]


def _softmax(capability: str, vocabulary: int, write_gradient: bool) -> CompileCase:
    config = CONFIGS[capability]
    return CompileCase(
        name=f"cross_entropy/V={vocabulary},gradient={write_gradient}",
        kernel=cross_entropy_kernel,
        signature={
            "logits_ptr": "*bf16",
            "targets_ptr": "*i64",
            "losses_ptr": "*fp32",
            "ignore_index": "i32",
            "z_loss": "fp32",
        },
        constexprs={
            "V": vocabulary,
            "WRITE_GRADIENT": write_gradient,
            "BLOCK_V": min(config.block_v, vocabulary),
        },
        num_warps=config.warps,
        capability=capability,
    )


def _scale(capability: str, x_type: str) -> CompileCase:
    return CompileCase(
        name=f"scale/{x_type}",
        kernel=scale_kernel,
        signature={
            "x_ptr": x_type,
            "out_ptr": "*bf16",
            "d_loss_ptr": "*fp32",
            "num_kept_ptr": "*i64",
            "numel": "i32",
        },
        constexprs={"BLOCK": SCALE_BLOCK},
        num_warps=SCALE_WARPS,
        capability=capability,
        divisible_by_16=("numel",),
    )
