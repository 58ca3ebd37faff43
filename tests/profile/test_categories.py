"""Kernel names as they appear in traces of H100s, A100s and RTX 3090s."""

import re
from pathlib import Path

import pytest

from hamner.profile.categories import CATEGORIES, category_of, category_of_name
from hamner.profile.trace import Activity, Range

KERNELS = Path(__file__).parents[2] / "kernels"

NAMES = {
    "matmul": [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>",
        "triton_tem_fused_mm_3",
        "grouped_matmul_kernel",
        "gate_up_kernel",
        "weight_grad_kernel",
        "aten::addmm",
    ],
    "attention": [
        "flash_attention_dk_dv_kernel",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
        "triton_tem_fused_flex_attention_0",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float>",
    ],
    "norm": [
        "rms_norm_backward_kernel",
        "_rms_norm_forward_kernel",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_4",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<...>",
    ],
    "swiglu": [
        "swiglu_forward_kernel",
        "swiglu_grad_kernel",
        "_swiglu_backward_kernel",
        "triton_poi_fused_mul_silu_split_7",
        "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(...)>",
    ],
    "rope": [
        "rope_kernel",
        "qk_norm_rope_kernel",
        "qk_norm_rope_backward_kernel",
        "_triton_rope",
        "triton_poi_fused_add_cat_clone_mul_neg_slice_2",
    ],
    "loss": [
        "cross_entropy_kernel",
        "scale_kernel",
        "liger_cross_entropy_kernel",
        "element_mul_kernel",
        "cunn_SoftMaxForward<..., at::native::LogSoftMaxForwardEpilogue>",
        "triton_red_fused__log_softmax_nll_loss_forward_1",
    ],
    "optimizer": [
        "adamw_kernel",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
        "void at::native::multi_tensor_apply_kernel<LpNormFunctor<c10::BFloat16, NormType::L2>>",
    ],
    "routing": [
        "route_kernel",
        "scan_kernel",
        "scatter_kernel",
        "sum_slots_kernel",
        "router_linear_forward_kernel",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "c10d::allreduce_",
        "void at::native::detail::chunk_cat_cuda_kernel<float, c10::BFloat16>",
        "at::native::detail::split_with_sizes_copy_out_contiguous_no_cast_kernel",
        "fsdp::all_gather_copy_in",
    ],
}
UNKNOWN = [
    "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>",
    "void cub::DeviceScanKernel<...>",
    "Memcpy HtoD (Pinned -> Device)",
    "Memset (Device)",
]


@pytest.mark.parametrize(
    ("category", "name"), [(c, name) for c, names in NAMES.items() for name in names]
)
def test_names_tell_the_category(category, name):
    assert category_of_name(name) == category


@pytest.mark.parametrize("name", UNKNOWN)
def test_common_kernels_tell_nothing(name):
    assert category_of_name(name) is None
    assert category_of(Activity(name, 0, 1, None, None)) == "other"


def test_every_kernel_of_ours_has_a_category():
    """Those launched from Python: the names a trace shows."""
    launched = {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert len(launched) > 10
    # An embedding's gradient is of no kind that the table has.
    launched -= {"embedding_runs_kernel", "embedding_long_runs_kernel"}
    assert {n for n in launched if category_of_name(n) in (None, *CATEGORIES[-2:])} == set()


def test_a_common_kernel_belongs_to_what_launched_it():
    step = Range("optimizer", 0, 10, is_operation=False)
    outer = Range("hamner::rms_norm_linear_backward", 1, 9, is_operation=True, parent=step)
    inner = Range("aten::sum", 2, 3, is_operation=True, parent=outer)
    reduce = "void at::native::reduce_kernel<512, 1>"
    assert category_of(Activity(reduce, 0, 1, None, inner)) == "norm"
    assert category_of(Activity(reduce, 0, 1, None, step)) == "optimizer"


def test_a_copy_of_a_list_belongs_to_what_is_around_it():
    """FSDP2 and optimizers have the same kernel for it, launched by the same operation."""
    kernel = (
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, "
        "CopyFunctor<c10::BFloat16, float, 2, 1, 1>, at::native::Copy<c10::BFloat16, float> >"
    )

    def category_inside(*names: str) -> str:
        inner = None
        for name in names:
            inner = Range(name, 0, 10, is_operation="::" in name, parent=inner)
        return category_of(Activity(kernel, 0, 1, None, inner))

    copy = "aten::_foreach_copy_"
    assert category_inside("forward", "fsdp::all_gather_copy_in", copy) == "communication"
    assert category_inside("optimizer", copy) == "optimizer"
    assert category_inside("graph") == "communication"
    assert category_inside() == "other"
