"""What README.md and docs/ say holds: their commands run, their links and flags exist.

A block that begins with ```bash run is run line by line, word for word, on small models and short
texts; a training ends after two steps. Every command of other blocks needs a GPU, a network, time,
or what such a command wrote: of these, and of commands within a sentence, the flags are looked up
in the `--help` of what they start.
"""

import io
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.distributed.run import get_args_parser

from bench.conftest import pytest_addoption as add_bench_options
from bench.int8_loss_report import describe, groups_of, option_of
from bench.recipes import read_results
from hamner.config.options import OPTIONS
from hamner.config.recipe import RECIPES
from hamner.hardware import GPUS
from hamner.plan.analysis import COMPARED, make_plan
from hamner.plan.communication import Parallelism
from tests.corpus import write_predictable

# One worker, whose pages share the runs of the first.
pytestmark = pytest.mark.xdist_group("documents")

ROOT = Path(__file__).parents[1]
README = "README.md"
PAGES = (README, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "profiles/README.md")
DOCUMENTS = (*PAGES, *BESIDE, "profiles/history.md", "profiles/plan.md")
TODAY = [document for document in DOCUMENTS if document != "CHANGELOG.md"]
"""those that name no command of earlier versions"""

MODULE = re.compile(r"-m (hamner\.\w+|bench\.\w+)\b")
SUBCOMMANDS = (
    "prepare",
    "train-tokenizer",
    "import",
    "read",
    "tune",
    "current",
    "ladder",
    "qk-norm",
    "long",
    "chat",
    "run",
)
SUBCOMMANDS += ("report", "fit")
NEEDS_MORE = re.compile(
    r"torchrun|hf:|--serve|pytest|venv|nsys|\bncu\b"
    r"|bench\.(tune|tune_flash_attention|scaling|soak|kills|report_card|int8_gradients)\b"
    r"|bench\.int8_loss run|bench\.recipes (tune|current|ladder|qk-norm|long|chat)"
    r"|tests\.kernels\.compile_gate"  # minutes; tests/kernels/test_compile_gate.py has it
)
"""what keeps a command from being run here"""
WRITES = ("--output", "--rows", "--out", "--run-dir")
"""flags that name what a command writes"""
STARTS_MODULE = re.compile(r"(?:python3?|torchrun .*?) -m (\w[\w.]*)")
COMMANDS = [
    *((f"hamner.{name}",) for name in ("train", "sft", "chat", "evaluate", "export")),
    *((f"hamner.{name}",) for name in ("plan", "plot", "profile")),
    *(("hamner.data", "prepare"), ("hamner.data", "train-tokenizer")),
    *(
        ("hamner.checkpoint", "import"),
        ("hamner.profile", "read"),
        ("bench.tune",),
        ("bench.scaling",),
        ("bench.recipes", "tune"),
    ),
]
"""whose flags a sentence may name without them"""
PASS_ON = ("bench.kills", "bench.scaling", "bench.recipes")
"""commands that hand flags to hamner.train"""
STARTED = r"(python -m|torchrun|pytest) "
PROGRAMS = {"source", "python", "nsys", "ncu", "python3", ".ci/run", "ruff", "apt-get"}
"""whose flags are their own"""
SHORTER = {
    "hamner.train": ("--stop-after", "2", "--device", "cpu"),
    "hamner.sft": ("--stop-after", "2", "--device", "cpu"),
    "hamner.chat": ("--max-new-tokens", "4", "--device", "cpu"),
    "hamner.evaluate": ("--device", "cpu"),
    "hamner.profile": ("--steps", "1", "--warmup", "1", "--device", "cpu"),
    "hamner.data": ("--vocab-size", "320"),
}
"""what is added to a command that is run"""


@dataclass(frozen=True)
class Block:
    """The block is a fenced one of a document."""

    language: str
    text: str

    def commands(self) -> list[str]:
        """Its commands, without comments, one or more a line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [shlex.join(shlex.split(line, comments=True)) for line in lines]
        return [part.strip() for line in found for part in line.split("'&&'") if part.strip()]


@cache
def read(document: str) -> tuple[str, tuple[Block, ...]]:
    """The function gives a document's text without its fenced blocks, and these."""
    text = (ROOT / document).read_text()
    fence = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    blocks = tuple(Block(*match) for match in fence.findall(text))
    return fence.sub("", text), blocks


def spans(document: str) -> Iterator[str]:
    """The function yields what stands between backticks in a document."""
    yield from re.findall(r"`([^`\n]+)`", read(document)[0])


@cache
def anchors(document: str) -> set[str]:
    """The function gives the anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", read(document)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_exist(document):
    text = read(document)[0]
    missing = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        path = (ROOT / document).parent.joinpath(name).resolve() if name else ROOT / document
        if not path.exists() or (
            anchor and anchor not in anchors(path.relative_to(ROOT).as_posix())
        ):
            missing.append(link)
    named = re.findall(r"`((?:hamner|kernels|bench|tests|profiles|docs|examples)/[\w/.-]*)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


# -- flags


def start(module: str, args: list[str]) -> int:
    """The function starts a module as `python -m` does, and gives the exit code."""
    given = sys.argv
    sys.argv = [module, *args]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it was imported before
            runpy.run_module(module, run_name="__main__")
    except SystemExit as exit_:
        return exit_.code or 0
    finally:
        sys.argv = given
    return 0


MISSING = object()
HEAD = re.compile(r"(?:^|│)\s*((?:-\w, |--[\w-]+, )*--[\w-]+)", re.MULTILINE)
HELP: dict[tuple[str, str], set[str]] = {}


@pytest.fixture
def flags_of(capsys, monkeypatch):
    """The fixture gives a function of module and subcommand: the flags that its help lists."""

    def find(module: str, subcommand: str = "") -> set[str]:
        if (module, subcommand) not in HELP:
            monkeypatch.setenv("COLUMNS", "120")
            assert start(module, [*filter(None, [subcommand]), "--help"]) == 0
            # In a column of its own: with others after a comma, --resume, --no-resume.
            heads = HEAD.findall(capsys.readouterr().out)
            HELP[module, subcommand] = {f for head in heads for f in re.findall(r"--[\w-]+", head)}
        return HELP[module, subcommand]

    return find


def given_flags(words: str) -> set[str]:
    """The function gives the long flags among some words as they are spelled."""
    return {word.partition("=")[0] for word in shlex.split(words) if re.match(r"--[a-z]", word)}


@cache
def torchrun_flags() -> set[str]:
    return set(re.findall(r"--[\w-]+", get_args_parser().format_help()))


@cache
def benchmark_flags() -> set[str]:
    """The function gives the flags that bench/conftest.py adds to pytest's."""
    parser = mock.Mock()
    add_bench_options(parser)
    return {call.args[0] for call in parser.getgroup.return_value.addoption.mock_calls}


def unknown_flags(command: str, flags_of, config: pytest.Config) -> set[str]:
    """The function gives those flags of a command that what it starts does not have."""
    program = shlex.split(command)[0]
    if module := MODULE.search(command):
        launcher, rest = command[: module.start()], command[module.end() :]
        subcommand = next((word for word in shlex.split(rest)[:1] if word in SUBCOMMANDS), "")
        known = flags_of(module[1], subcommand) | {"--help"}
        if module[1] in PASS_ON:
            known |= flags_of("hamner.train")
        unknown = given_flags(rest) - known
        return unknown | (
            given_flags(launcher) - torchrun_flags() if program == "torchrun" else set()
        )
    if program == "pytest":
        given = given_flags(command) - benchmark_flags()
        return {flag for flag in given if config.getoption(flag, MISSING) is MISSING}
    assert program in PROGRAMS or program.startswith((".venv/", "examples/")), f"what is {command}?"
    return set()


def is_shell(block: Block) -> bool:
    return block.language.startswith("bash")


def commands_of(document: str) -> list[str]:
    """The function gives a document's commands, in blocks and within sentences."""
    commands = [c for block in read(document)[1] if is_shell(block) for c in block.commands()]
    within = [span for span in spans(document) if re.match(STARTED, span) and "..." not in span]
    return commands + within


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("document", TODAY)
def test_modules_exist(document):
    named = {name for c in commands_of(document) for name in STARTS_MODULE.findall(c)}
    assert [name for name in sorted(named) if not is_module(name)] == []


@pytest.mark.parametrize("document", TODAY)
def test_flags_exist(document, flags_of, pytestconfig):
    commands = commands_of(document)
    wrong = {command: unknown_flags(command, flags_of, pytestconfig) for command in commands}
    assert {command: flags for command, flags in wrong.items() if flags} == {}
    named = re.findall(r"(?<!\S)(?:bench|tests|examples|profiles)/[\w/.-]+", " ".join(commands))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", PAGES)
def test_flags_within_a_sentence_exist(document, flags_of):
    known = torchrun_flags() | benchmark_flags() | {"--help"}
    for command in COMMANDS:
        known |= flags_of(*command)
    within = [span for span in spans(document) if span.startswith("--")]
    assert [span for span in within if not given_flags(span) <= known] == []


# -- commands


def is_run(block: Block) -> bool:
    return block.language == "bash run"


def could_run(block: Block) -> list[str]:
    """The function gives a block's commands that need no more than this machine and the files that
    it has: neither NEEDS_MORE nor what a command of the block that does has written."""
    found, written = [], []
    for command in block.commands():
        words = shlex.split(command)
        if NEEDS_MORE.search(command):
            pairs = zip(words, words[1:], strict=False)
            written += [value for flag, value in pairs if flag in WRITES]
        elif not any(Path(word).is_relative_to(path) for word in words for path in written):
            found.append(command)
    return found


@pytest.mark.parametrize("document", PAGES)
def test_what_needs_no_gpu_and_no_network_is_run(document):
    blocks = [block for block in read(document)[1] if is_shell(block) and not is_run(block)]
    assert [command for block in blocks for command in could_run(block)] == []


def test_commands_are_judged_one_by_one():
    lines = (
        "python -m bench.scaling --output scaling",
        "python -m hamner.profile read scaling/a.json.gz",
        "python -m hamner.profile read profiles/a.json.gz",
        "python -m hamner.plan --option a --gpus 2",
        "python -m bench.recipes fit profiles/recipes",
    )
    assert could_run(Block("bash", "\n".join(lines))) == [*lines[2:]]


SMALL = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
SMALL |= {"expert_intermediate_size": 128, "max_seq_len": 128, "vocab_size": 320}
OPTION_ROW = {
    "kind": "option",
    "option": "a",
    "recompute": "selective",
    "batch_size": 24,
    "micro_batch_size": 24,
    "tokens_per_second": 200_000,
    "mfu": 0.4,
    "peak_allocated_gib": 16.0,
    "peak_reserved_gib": 17.0,
    "build_seconds": 2.0,
    "warm_up_seconds": 30.0,
    "conditions": {"gpu": "NVIDIA X"},
}
OPTION_ROW |= {"p10_ms": 9.0, "p50_ms": 10.0, "p90_ms": 11.0}
DATA_ROW = {"kind": "data", "source": "shards", "tokens_per_second": 20_000_000}
"""of the suite"""


class Reader:
    """A reader types what the pages say into one folder, each command once.

    Args:
        folder: has texts/*.parquet, personal/*.jsonl, sft/*.jsonl, a copy of the project's
            profiles/, and in place of what only a GPU gives rows.jsonl and a trace in
            runs/scaling/.
        monkeypatch: of the module.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.done: set[str] = set()

    def type(self, command: str) -> None:
        """The reader types a command, which must succeed."""
        if command in self.done:
            return
        module = MODULE.search(command)
        assert module is not None, f"a block to run has `{command}`"
        name, args = module[1], []
        for word in shlex.split(command[module.end() :]):
            args.append(word)
        if name == "hamner.train" and "--option" in args and "--help" not in args:
            # A new run, where that of another page may be.
            shutil.rmtree(self.folder / "runs" / args[args.index("--option") + 1], True)
        if args[0] != "read":
            args += SHORTER.get(name, ())
        with self.monkeypatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "stdin", io.StringIO("Hello there!\n"))
            if name == "bench.recipes":
                patch.setattr("hamner.plan.recipe_gain.RATIOS", self.folder / "ratios.json")
            is_small = name != "hamner.plan" and not name.startswith("bench.")
            for option, config in OPTIONS.items() if is_small else ():
                small = replace(config.model, **SMALL)
                how = {"seq_len": 128, "batch_size": 4, "eval_tokens": 1024, "val_fraction": 0.1}
                how |= {"log_every": 1}
                patch.setitem(OPTIONS, option, replace(config, model=small, **how))
            assert start(name, args) == 0, command
        self.done.add(command)

    def type_page(self, document: str) -> None:
        """The reader types what a page's blocks to run say."""
        for block in read(document)[1]:
            for command in block.commands() if is_run(block) else ():
                self.type(command)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    """The reader has followed README.md: runs/a, runs/a-sft and runs/b are there."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("texts", "personal", "sft"):
        (folder / name).mkdir()
    write_predictable(folder / "personal/mine.jsonl")
    lines = [" ".join(f"word{n * k % 97}" for k in range(120)) for n in range(1, 80)]
    pq.write_table(pa.table({"text": lines}), folder / "texts/one.parquet")
    shutil.copy(ROOT / "hamner/data/conversations/builtin.jsonl", folder / "sft/mine.jsonl")
    shutil.copytree(ROOT / "profiles", folder / "profiles")  # pictures of reports go there
    lines = [json.dumps({"extra_info": row}) + "\n" for row in (OPTION_ROW, DATA_ROW)]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "runs/scaling").mkdir(parents=True)
    shutil.copy(
        ROOT / "profiles/two-gpus/trace.json.gz", folder / "runs/scaling/a-ddp-8.trace.json.gz"
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("hamner.train.pictures.COMMAND", ("true",))
        reader = Reader(folder, monkeypatch)
        reader.type("python -m hamner.train --option b --data texts")
        reader.type_page(README)
        yield reader


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(map(is_run, read(d)[1]))])
def test_commands_run(reader, document):
    reader.type_page(document)


@pytest.mark.parametrize("document", [d for d in PAGES if d != README])
def test_python_runs(document):
    for block in read(document)[1]:
        if block.language == "python":
            exec(compile(block.text, document, "exec"), {})


# -- README.md


def test_readme_is_short():
    text = (ROOT / README).read_text()
    assert len(text.encode()) <= 8 * 1024


def test_readme_has_the_options_and_their_projections():
    rows = read(README)[0].splitlines()
    for name, config in OPTIONS.items():
        model = config.model
        total, active = (
            n / 1e6 for n in (model.num_parameters(), model.num_parameters(active=True))
        )
        parameters = f"{total:.1f}M" + (f", {active:.1f}M a token" if active != total else "")
        projected = ""
        if name in COMPARED:
            prediction = make_plan(config, GPUS["rtx-3090"]).prediction
            speed, gib = prediction.interval, prediction.peak_gib
            projected = f"{speed.best:,.0f} ({speed.low:,.0f}–{speed.high:,.0f}) tokens/s, "
            projected += f"{gib:.1f} GiB"
        cells = f"{model.num_layers} × {model.hidden_size} | {parameters} | "
        cells += f"{config.batch_size} × {config.seq_len} | {projected}"
        (row,) = [row for row in rows if row.startswith(f"| `{name}` | {model.num_layers} ×")]
        assert row.startswith(f"| `{name}` | {cells}".rstrip()), cells


def test_sentences_quote_the_plan():
    """Hours, milliseconds and tokens/s of an RTX 3090 that stand in sentences are the plan's."""
    option, card = OPTIONS["a"], GPUS["rtx-3090"]
    muon = replace(option, recipe="muon", **RECIPES["muon"])
    hours = [make_plan(replace(muon, tokens=n), card).hours for n in (10**9, 10**10)]
    assert f"projected at {hours[0]:.0f} hours" in read("docs/chatbot.md")[0]
    overnight = (ROOT / "examples/overnight.sh").read_text()
    assert f"(projected, {hours[0]:.0f} h)" in overnight
    int8 = make_plan(replace(muon, matmul="int8", tokens=10**9), card).hours
    assert f"(projected, {int8:.0f} h)" in overnight
    assert f"`--matmul int8` the night is projected at {int8:.0f} h" in read("docs/chatbot.md")[0]
    assert f"{hours[1] / 24:.0f}" == "5"
    assert "the whole plan: five days" in overnight
    assert "about five days" in read(README)[0]
    tuning = make_plan(replace(option, batch_size=8, tokens=10_000 * 8 * 1024), card)
    assert f"{tuning.hours:.0f}" == "1"
    assert "--steps 10000}              # flags of hamner.sft: an hour of a 3090" in overnight
    normed = replace(option, model=replace(option.model, qk_norm=True))
    with_it, without = (make_plan(o, card).prediction.step_ms for o in (normed, option))
    more = f"{with_it - without:.1f} ms longer on a 3090 ({with_it / without - 1:.1%})"
    assert more in read("docs/recipes.md")[0]
    long = make_plan(replace(muon, model=normed.model, tokens=250e6), card)
    best, worst = long.prediction.interval.hours(250e6)
    said = f"{long.hours:.1f} hours of an RTX 3090 ({best:.1f}–{worst:.1f}, projected"
    assert said in read("docs/recipes.md")[0]
    two = make_plan(option, card, Parallelism("auto", 2, 1, 10.0))
    said = f"{two.prediction.tokens_per_second:,.0f} tokens/s, {two.efficiency:.0%} of twice"
    assert said in read("docs/several-gpus.md")[0]


def test_losses_of_int8_are_those_of_the_runs():
    page = read("docs/training.md")[0].splitlines()
    groups = groups_of(read_results(ROOT / "profiles/int8/loss"))
    assert len(groups) == 3
    for arms in groups.values():
        said, run = "\n".join(describe(arms, {})), arms["bf16"][0]
        name = f"| `{option_of(run)}`, `{run['arm']}`, "
        (row,) = [row for row in page if row.startswith(name)]
        assert f"| {re.search(r'bf16: ([.0-9]+)', said)[1]}" in row
        gaps = re.findall(r"gap (\S+) (\(.*?\)) nats", said)
        assert len(gaps) == len(arms) - 1
        for gap, interval in gaps:
            assert f"| {gap} {interval} |".replace(" (no interval)", "") in row
        for share in re.findall(r"([.0-9]+)% of its products", said):
            assert f"| {float(share):.0f}% |" in row


def test_readme_has_the_results_of_the_page_about_measuring():
    rows = re.findall(r"^\| `.*%.*$", read(README)[0], re.MULTILINE)
    assert len(rows) == 5
    assert set(rows) <= set(read("docs/measuring.md")[0].splitlines())


def test_gate_does_what_readme_says():
    gate = (ROOT / ".ci/run").read_text()
    (train, test) = [b.commands() for b in read(README)[1] if ".venv/bin/pip" in b.text]
    assert train[-1] in gate
    assert test[-1] in gate


def test_pip_installs_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for document in DOCUMENTS:
        for extras in re.findall(r"pip install [^`\n]*\[([\w,]+)\]", (ROOT / document).read_text()):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), document


def test_every_page_is_in_readme():
    assert [page for page in PAGES[1:] if f"]({page})" not in read(README)[0]] == []
