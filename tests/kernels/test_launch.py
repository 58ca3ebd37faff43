import pytest
import torch

from hamner.kernels.launch import capability


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
