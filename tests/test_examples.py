"""The example scripts: those of several machines have flags that exist, and the one that makes a
chatbot of one GPU's night goes on wherever it was killed."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from hamner.config.options import total_tokens
from hamner.files import write_whole
from hamner.train.__main__ import parse
from tests import forked
from tests.corpus import write_predictable

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = [EXAMPLES / "slurm.sh", EXAMPLES / "ssh.sh"]
OVERNIGHT = EXAMPLES / "overnight.sh"


def test_there_is_one_for_each_way_to_start():
    assert sorted(EXAMPLES.iterdir()) == sorted([OVERNIGHT, *SCRIPTS])


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


# In place of Python: hands its arguments to the test, which answers with an exit code. It does not
# keep the script's lock, as a command does not that is killed together with it.
STAND_IN = """#!/bin/bash
exec 9>&-
folder=$(dirname "$0")
printf '%s\\0' "$@" > "$folder/asked.new"
mv "$folder/asked.new" "$folder/asked"
until [ -e "$folder/answer" ]; do sleep 0.02; done
read -r code < "$folder/answer"
rm "$folder/answer"
exit "$code"
"""
SMALL = (
    *("--hidden-size", "64", "--num-layers", "1", "--expert-intermediate-size", "128"),
    *("--max-seq-len", "128", "--seq-len", "128", "--batch-size", "4", "--device", "cpu"),
    *("--save-every", "5", "--log-every", "5", "--warmup-steps", "2"),
)


STAGES = {
    "OPTION": "base",
    "RECIPE": "base",
    "PERSONAL": "base",
    "TOKENS": "base",
    "DATA": "shards",
    "CONVERSATIONS": "chat",
    "TUNING": "chat",
}
"""what each value is of"""


class Night:
    """The script runs in a folder, and each of its commands in a forked process of the test's.

    Args:
        folder: where it works.
        flags: of hamner.train.
    """

    def __init__(self, folder: Path, flags: Sequence[str] = SMALL) -> None:
        self.folder, self.flags = folder, flags
        self.python = folder / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        corpus = write_predictable(folder / "text.jsonl", documents=300, length=300)
        self.environment = {
            **os.environ,
            "PYTHON": str(self.python),
            "OPTION": "tiny",
            "TOKENS": "16384",
            "DATA": corpus.name,
            "CONVERSATIONS": "builtin",
            "TUNING": "--epochs 3",
            "FOLDER": "out",
        }

    def run(
        self, kill_when: Callable[[list[str]], bool] = lambda command: False
    ) -> list[list[str]]:
        """The script is started; where `kill_when` says so of a command under way, both die.

        Returns:
            The commands that it gave.
        """
        script = subprocess.Popen(
            [OVERNIGHT, *self.flags],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "said.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        commands = []
        asked = self.folder / "asked"
        while script.poll() is None:
            if not asked.exists():
                time.sleep(0.02)
                continue
            commands.append(asked.read_text().split("\0")[:-1])
            asked.unlink()
            command = forked.Popen([sys.executable, *commands[-1]], cwd=self.folder, text=True)
            while command.poll() is None:
                if kill_when(commands[-1]):
                    script.kill()
                    command.kill()
                time.sleep(0.01)
            self.errors = command.communicate()[1]
            answer = self.folder / "answer"
            # Whole when it is seen: an empty one would be an exit code of 2.
            write_whole(answer, f"{command.returncode & 255}\n")
            while answer.exists():
                time.sleep(0.01)
        self.code = script.returncode
        return commands

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()


def test_a_night_that_is_killed_goes_on_to_its_end(tmp_path):
    night = Night(tmp_path)
    before = night.environment.copy()
    run, chat = tmp_path / "out" / "base", tmp_path / "out" / "chat"

    def in_pre_training(command: list[str]) -> bool:
        return "hamner.train" in command and any(run.glob("checkpoints/step_*5"))

    def in_fine_tuning(command: list[str]) -> bool:
        return "hamner.sft" in command and (chat / "config.json").exists()

    commands = night.run(in_pre_training)
    modules = [command[1] for command in commands]
    begun = ["hamner.train", "hamner.sft", "hamner.data", "hamner.train"]
    assert modules == begun, night.errors
    assert night.code == -signal.SIGKILL
    assert not any((tmp_path / "out").glob("trial*/"))
    commands = night.run(in_fine_tuning)
    assert [command[1] for command in commands] == ["hamner.train", "hamner.sft"], night.errors
    assert ("--resume" in commands[0], "--resume" in commands[1]) == (True, False)
    assert "== shards: done before\n== base\n" in night.said
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20, 25, 30, 32]
    config = json.loads((run / "config.json").read_text())
    assert (config["recipe"], config["optimizer"]) == ("muon", "muon")
    commands = night.run()
    assert [command[1] for command in commands] == ["hamner.sft", "hamner.evaluate"], night.errors
    assert "--resume" in commands[0]
    assert night.code == 0, night.errors
    base, chatbot = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    assert [base["is_chat"], chatbot["is_chat"]] == [False, True]
    assert night.run() == []
    assert "hamner.chat --checkpoint out/chat" in night.said
    for name, stage in STAGES.items():  # each would go unheard
        night.environment[name] = "other"
        assert night.run() == []
        assert night.code == 2
        was = re.escape(before.get(name, ""))
        sentence = (
            f"error: out/{stage} was begun with {name}={was}.*, not {name}=other: start again"
        )
        assert re.fullmatch(f"{sentence} with that or in another FOLDER\n", night.said)
        night.environment = before.copy()
    begun = tmp_path / "out" / "chat.begun"
    begun.write_text(begun.read_text().replace("TUNING", "OTHER"))  # as by an earlier script
    assert night.run() == []
    assert night.code == 0


def test_a_night_ends_with_what_fails_in_it(tmp_path):
    night = Night(tmp_path)
    night.environment["DATA"] = "nothing.jsonl"
    modules = [command[1] for command in night.run()]
    assert modules == ["hamner.train", "hamner.sft", "hamner.data"]
    assert night.code == 2
    assert "error: --data nothing.jsonl: no such file" in night.errors
    assert not (tmp_path / "out" / "shards.done").exists()


@pytest.mark.parametrize(
    ("flags", "environment", "module", "said"),
    [
        (("--lr", "-1"), {}, "hamner.train", "error: --lr -1.0 must be above 0"),
        ((), {"OPTION": "z"}, "hamner.train", "error: --option z is not one of tiny"),
        ((), {"PERSONAL": "none.jsonl"}, "hamner.train", "error: --data none.jsonl: no such file"),
        ((), {"CONVERSATIONS": "none.jsonl"}, "hamner.sft", "error: --data none.jsonl: no such"),
        ((), {"TUNING": "--lr -1"}, "hamner.sft", "error: --lr -1.0 must be above 0"),
    ],
    ids=["flag", "option", "data", "conversations", "tuning"],
)
def test_what_is_refused_is_said_before_hours_of_shards(flags, environment, module, said, tmp_path):
    night = Night(tmp_path, [*SMALL, *flags])
    night.environment |= environment
    assert night.run()[-1][1] == module
    assert night.code == 2
    assert said in night.errors
    assert not (tmp_path / "out" / "shards.begun").exists()


def test_a_second_start_in_the_same_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    night = Night(tmp_path)
    with (tmp_path / "out" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert night.run() == []
    assert night.code == 2
    assert night.said == "error: an earlier start, or a command that it left, still works in out\n"
