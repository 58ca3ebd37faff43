"""The model card that an export carries."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import transformers
from huggingface_hub import ModelCard

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import append_record
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.train import CONFIG_FILE, FineTuning, TrainConfig
from hamner.export.__main__ import ExportConfig, export
from hamner.export.card import model_card
from hamner.model.sampling import Sampling
from tests.models import DENSE, MOE, build
from tests.saved import save_run

SHAPE = replace(DENSE, vocab_size=600, num_layers=1)
MIX = (
    "hf:HuggingFaceFW/fineweb-edu:sample-10BT=0.9",
    "/home/someone/diary/lang=en/*.jsonl=0.05",
    "shards:/home/someone/shards=0.05",
)


@pytest.fixture
def run(tmp_path):
    """A run as it is after training on a mixture."""
    folder = save_run(tmp_path / "mine", build(SHAPE))
    change(folder, data=MIX)
    for step, loss in ((6, 3.5), (7, 3.25), (8, 9.0)):
        append_record(folder / "metrics.jsonl", {"step": step, "loss": loss})
    return folder


def change(folder, **values) -> None:
    """The run's configuration gets other values."""
    config = TrainConfig.read(folder / CONFIG_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(replace(config, **values).to_json()))


def know(monkeypatch, **state) -> None:
    """Checkpoints have this state too."""
    real = checkpoint.Checkpoint.state
    monkeypatch.setattr(checkpoint.Checkpoint, "state", lambda self: real(self) | state)


def card_of(folder) -> str:
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return model_card(find_saved_model(folder), names)


def front_matter(card: str) -> dict:
    """What the Hub reads of it."""
    return ModelCard(card).data.to_dict()


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, re.MULTILINE))


def test_a_base_model(run, monkeypatch, tmp_path):
    know(monkeypatch, tokens=1234, val_loss=3.0, val_step=5, versions={"hamner": "9.9"})
    folder = export(ExportConfig(tmp_path / "out", "hf", run))
    card = (folder / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hamner", "llama"],
        "datasets": ["HuggingFaceFW/fineweb-edu"],
    }
    assert "# license: state yours here" in card
    table = rows(card)
    assert table["architecture"].startswith("LlamaForCausalLM")
    assert table["parameters"] == f"{SHAPE.num_parameters():,}"
    assert table["tokens"] == "1,234 in 7 steps of 24 x 64"
    assert table["final training loss"] == "3.2500 nats per token"
    assert table["final validation loss"] == (
        "3.0000 nats per token (perplexity 20.09) on held-out documents, at step 5"
    )
    assert table["recipe"].startswith("plan: hidden adamw 0.0002")
    assert "from random weights with Hamner 9.9." in card
    assert "does not follow instructions" in card
    assert "someone" not in card
    assert table["data"] == (
        "`hf:HuggingFaceFW/fineweb-edu:sample-10BT` (weight 0.9)<br>local `*.jsonl` (weight 0.05)"
        "<br>local `shards:shards` (weight 0.05)"
    )


def test_a_chat_model_says_what_it_started_from(run, tmp_path):
    folder = save_run(tmp_path / "mine-sft", build(SHAPE), chat=True)
    change(folder, sft=FineTuning(checkpoint=run / "checkpoints" / "step_00000007"))
    card = card_of(folder)
    assert front_matter(card)["tags"][-1] == "conversational"
    assert "datasets" not in front_matter(card)
    assert rows(card)["started from"].startswith("`mine`, trained on `hf:HuggingFaceFW/fineweb-edu")
    assert rows(card)["data"] == "`builtin`"
    assert "apply_chat_template" in card
    assert "final training loss" not in card  # its log is not there
    change(folder, sft=FineTuning(checkpoint=tmp_path / "gone"))
    assert rows(card_of(folder))["started from"] == "`gone`, whose training is not known here"


def test_what_is_not_known_of_a_model_is_not_claimed(run, monkeypatch):
    know(monkeypatch, imported_from="old.pt", tokens=50)
    table = rows(card_of(run))
    assert (table["tokens"], table["data"]) == ("50 in 7 steps", "not known here")
    assert "recipe" not in table
    assert "trained elsewhere, and imported into Hamner" in card_of(run)


def test_data_of_an_imported_model_is_not_claimed_of_one_tuned_from_it(run, tmp_path):
    """Its config.json has the default of --data, which it was not trained on."""
    folder = save_run(tmp_path / "mine-sft", build(SHAPE), chat=True)
    step = run / "checkpoints" / "step_00000007"
    copied = shutil.copytree(step, tmp_path / "copied" / "step_00000007")
    for origin in (run, step, copied):
        change(folder, sft=FineTuning(checkpoint=origin))
        assert "trained on" in rows(card_of(folder))["started from"]
    for path in (step, copied):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"imported_from": "old.pt"}))
    for origin in (run, step, copied):
        change(folder, sft=FineTuning(checkpoint=origin))
        started = rows(card_of(folder))["started from"]
        assert started.endswith(", whose training is not known here")


def test_a_card_is_written_of_data_that_is_gone(run):
    """A path with "=" in it then looks like one with a weight."""
    change(run, data=("/home/someone/lang=en",))
    assert rows(card_of(run))["data"] == "local `lang=en`"


def test_a_mixture_says_what_is_active(tmp_path):
    shape = replace(MOE, vocab_size=600)
    table = rows(card_of(save_run(tmp_path / "moe", build(shape))))
    active = f"{shape.num_parameters(active=True):,} active per token"
    assert table["parameters"] == f"{shape.num_parameters():,}, {active}"
    assert table["MLP"] == "4 experts, 2 active, each 48 wide"


def test_the_code_on_the_card_runs(run, tmp_path, monkeypatch, capsys):
    """Of a base model and of a chat model, with hamner.chat's settings in the latter."""
    chat = save_run(tmp_path / "chat", build(SHAPE), chat=True)
    for number, source in enumerate((run, chat)):
        folder = export(ExportConfig(tmp_path / f"out{number}", "hf", source))
        (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(folder)
        exec(code.replace("max_new_tokens=100", "max_new_tokens=3"), {})
        assert capsys.readouterr().out.strip()
    settings = transformers.GenerationConfig.from_pretrained(folder)
    default = Sampling()
    assert settings.do_sample
    assert (settings.temperature, settings.top_k, settings.top_p) == (
        *(default.temperature, default.top_k, default.top_p),
    )
    # It would also apply to greedy decoding.
    assert settings.repetition_penalty in (None, 1.0)
