import pytest
import torch

from hamner.kernels.launch import capability, sum_partials


@pytest.mark.parametrize(
    ("card", "row"),
    [
        ((8, 0), "8.0"),
        ((8, 6), "8.6"),
        ((8, 9), "8.0"),
        ((9, 0), "9.0"),
        ((10, 0), "9.0"),
        ((12, 0), "8.0"),  # RTX 50: compute of its own, but 101,376 bytes of shared memory
    ],
)
def test_row_of_a_card(card, row, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    assert capability(torch.device("cuda")) == row


def test_the_interpreter_runs_the_rows_of_a_3090():
    assert capability(torch.device("cpu")) == "8.6"


def test_partial_sums_of_more_rows_than_a_tile(device):
    """As many as a GPU's programs write: 256 rows at a time, the last ones fewer."""
    partials = torch.arange(600 * 9, dtype=torch.float32, device=device).view(600, 3, 3) % 101
    like = torch.empty(3, 3, dtype=torch.float16, device=device)
    assert torch.equal(sum_partials(partials, like), partials.double().sum(dim=0).half())
