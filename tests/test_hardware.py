"""Cards are recognised by the driver's name, or plainly unknown."""

import pytest

from hamner.hardware import GPUS, identify


@pytest.mark.parametrize(
    ("driver_name", "key"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_known_cards(driver_name, key):
    assert identify(driver_name) is GPUS[key]


@pytest.mark.parametrize("driver_name", ["NVIDIA GeForce RTX 4090 D", "NVIDIA L4", "AMD MI300X"])
def test_other_cards_are_unknown(driver_name):
    assert identify(driver_name) is None
