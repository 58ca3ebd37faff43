"""The options train with the kernels of an RTX 3090 as they do with those of the GPU at hand."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from bench.as_capability import as_capability
from hamner.config.options import for_option
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.data.tokenizer import load_tokenizer
from hamner.train.data import open_loader
from hamner.train.step import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("most of the GPU's memory")]

STEPS, ROWS, LR = 100, 4, 2e-4
WINDOW = 10
"""steps over which losses are averaged where they are compared as numbers"""


def configure(option: str) -> TrainConfig:
    """The option at its width, depth and sequence length, with fewer rows."""
    return replace(
        for_option(option),
        batch_size=ROWS,
        micro_batch_size=ROWS,
        seq_len=1024,
        recompute="selective",
        attention="triton",
        device="cuda",
    )


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """The same batches for all options, whose tokenizer is one."""
    config = configure("a")
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    with contextlib.closing(open_loader(config, tokenizer, pin_memory=True)) as loader:
        return list(islice(loader, STEPS))


def train(config: TrainConfig, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of all steps, (steps,), and the weights after them.

    The learning rate rises to LR as at the start of a run: at once there, rounding alone has taken
    two runs of one code 0.07 nats apart after 100 steps.
    """
    with contextlib.closing(TrainStep(config, may_step_down=False)) as step:
        rates = torch.linspace(0, LR, len(batches) + 1)[1:].tolist()
        losses = torch.stack(
            [step.step(batch, lr).loss for batch, lr in zip(batches, rates, strict=True)]
        )
        return losses, {name: p.detach() for name, p in step.model.named_parameters()}


def distance(a: Tensor, b: Tensor) -> float:
    """The root mean square, over all steps, of the difference of two runs' losses."""
    return (a - b).square().mean().sqrt().item()


@contextlib.contextmanager
def another_gpu(capability: str) -> Iterator[None]:
    """The code of another GPU; the test is skipped where that is the GPU's own, or newer."""
    with as_capability(None):
        own = torch.cuda.get_device_capability()
    if own <= tuple(map(int, capability.split("."))):
        pytest.skip(f"needs a GPU newer than capability {capability}")
    with as_capability(capability):
        yield


@pytest.mark.parametrize("option", ["current", "a", "b", "c", "c-shared"])
def test_options_train(option, batches, record_property, request):
    """Two runs agree to the bit; their distance to the GPU's own code is rounding.

    Rounding is measured on the same batches: plain torch (eager, cuBLAS and SDPA), and the GPU's
    own code with another attention, compute the same in bf16 and round elsewhere. The larger of
    their distances to the GPU's own code is the unit, of which the older code may be twice as far,
    the factor by which kernels may differ from torch in their own tests.
    """
    if request.config.getoption("as_capability") is None:
        pytest.skip("needs --as-capability: the five options take five minutes")
    config = configure(option)
    with another_gpu("8.6"):
        older, weights = train(config, batches)
        again, weights_again = train(config, batches)
    with as_capability(None):
        own, _ = train(config, batches)
        plain, _ = train(
            replace(config, kernels="torch", attention="sdpa", recompute="none"), batches
        )
        other, _ = train(replace(config, attention="sdpa"), batches)
    rounding = max(distance(plain, own), distance(other, own))
    found = distance(older, own)
    ends = ", ".join(f"{x[-WINDOW:].mean():.4f}" for x in (older, own, plain, other))
    record_property(
        "losses of 100 steps as 8.6",
        [
            f"{option:<9} rms distance to the GPU's own code {found:.2e}, of rounding "
            f"{rounding:.2e}; mean of the last {WINDOW} losses {ends} (8.6, own, plain torch, "
            "own with SDPA)"
        ],
    )
    assert torch.equal(older, again)
    assert all(torch.equal(weight, weights_again[name]) for name, weight in weights.items())
    assert own[:WINDOW].mean() - own[-WINDOW:].mean() > 1.0
    assert found <= 2 * rounding
