"""The scripts that start a run on several machines can be read by bash; their flags exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from hamner.config.options import total_tokens
from hamner.train.__main__ import parse

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.sh"))


def test_there_is_one_for_each_way_to_start():
    assert [script.name for script in SCRIPTS] == ["slurm.sh", "ssh.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_script(script):
    subprocess.run(["bash", "-n", script], check=True)
    commands = script.read_text().replace("\\\n", " ")
    launch, train = re.search(r"/torchrun (.*?) -m hamner\.train (.*?)[\"\n]", commands).groups()
    # Of torchrun, what the shell would fill in stays as it is written: flags only are looked at.
    launcher = get_args_parser().parse_args([*shlex.split(launch), "-m", "hamner.train"])
    assert launcher.rdzv_backend == "c10d"
    assert launcher.rdzv_endpoint.endswith(":29500")
    config = parse(shlex.split(train))
    assert total_tokens(config) <= 10e9 < total_tokens(config) + config.tokens_per_step
