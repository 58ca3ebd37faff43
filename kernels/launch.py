"""The capability of a device says which row of an op's launch table it uses.

Every op keeps a small table ``{"8.6": ..., "8.0": ..., "9.0": ...}``; tuning is a command, never a
surprise at step one. Rows must fit the smallest card that uses them:

- ``"8.6"``: RTX 30 series; 101,376 bytes of shared memory a block, 6 MB of L2 on a 3090.
- ``"8.0"``: A100 and, with the 8.6 limit of 101,376 bytes, 8.9 and 12.x (RTX 40 and 50 series).
- ``"9.0"``: H100, H200 and 10.x (B200); 232,448 bytes.
"""

import torch

CAPABILITIES = ("8.6", "8.0", "9.0")


def capability(device: torch.device) -> str:
    """The function names the launch table row for `device`.

    The CPU (Triton's interpreter) uses the 3090's row, so that the tests run what that card runs.
    """
    if device.type != "cuda":
        return "8.6"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return "9.0"
    return "8.6" if (major, minor) in ((8, 6), (8, 7)) else "8.0"
