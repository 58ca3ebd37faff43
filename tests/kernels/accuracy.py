"""The one accuracy criterion of the kernel tests.

A kernel is right when its largest error against fp64 is at most twice that of plain torch in the
same dtype (flash-attention's criterion), with a floor of a few eps of the output's own scale for
results where plain torch happens to be exact.
"""

import torch


def assert_as_accurate_as_torch(
    name: str,
    actual: torch.Tensor,
    same_dtype: torch.Tensor,
    exact: torch.Tensor,
    *,
    factor: float = 2.0,
    floor_eps: float = 4.0,
) -> None:
    """Compare `actual` with fp64 `exact`, allowing `factor` times the error of `same_dtype`.

    Args:
        name: what is compared, for the message.
        actual: the kernel's result, any dtype.
        same_dtype: plain torch's result computed in the kernel's input dtype.
        exact: plain torch's result computed in fp64.
        factor: allowed multiple of plain torch's largest error.
        floor_eps: floor, in eps of `actual.dtype` times the largest exact value.

    Raises:
        AssertionError: wrong shape or dtype, a value that is not finite, or too large an error.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, expected {same_dtype.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item()
    torch_error = (same_dtype.double() - exact).abs().max().item()
    floor = floor_eps * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    allowed = max(factor * torch_error, floor)
    assert error <= allowed, (
        f"{name}: error {error:.3e} against fp64; plain torch in {actual.dtype} has "
        f"{torch_error:.3e}, allowed {allowed:.3e}"
    )
