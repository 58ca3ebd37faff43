"""The module writes the model card that goes with an export: what the model is, and what it is not.

The front matter is YAML as the Hugging Face Hub reads it. Paths of the machine that trained are
left out, but for the last part of local data's.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import SavedModel
from hamner.config.train import CONFIG_FILE, TrainConfig, run_of
from hamner.data.specs import Spec, parse_specs
from hamner.errors import UserError
from hamner.files import read_records
from hamner.train.messages import recipe

LICENSE = "license: state yours here before you publish the model"


def model_card(saved: SavedModel, model_config: dict) -> str:
    """The function gives the content of README.md.

    Args:
        saved: the model.
        model_config: of its config.json.
    """
    parts = [
        _front_matter(saved, model_config["model_type"]),
        f"# {saved.name}",
        _summary(saved),
        "## Model",
        _table(_shape(saved, model_config["architectures"][0])),
        "## Training",
        _table(_training(saved)),
        "## How to use it",
        _usage(saved),
        "## What it is not",
        _limits(saved),
        "## License",
        "None is stated. Whoever publishes this model names its license here and in the front "
        "matter, and sees to it that the licenses of the data allow it.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(saved: SavedModel, kind: str) -> str:
    hub = [spec.location for spec in _specs(saved.config) if spec.kind == "hub"]
    # A string of JSON is one of YAML.
    names = [json.dumps(":".join(location.split(":")[:1])) for location in hub]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in ("hamner", kind, *(["conversational"] * saved.is_chat))]
    lines += ["datasets:", *(f"- {name}" for name in dict.fromkeys(names))] if names else []
    return "\n".join(["---", *lines, f"# {LICENSE}", "---"])


def _summary(saved: SavedModel) -> str:
    parameters = saved.config.model.num_parameters()
    what = "chat model" if saved.is_chat else "base model"
    tuned = "fine-tuned on conversations, " if saved.is_chat else ""
    how = f"with Hamner {saved.checkpoint.state().get('versions', {}).get('hamner', '')}".rstrip()
    if _is_imported(saved.checkpoint):
        how = "elsewhere, and imported into Hamner"
    elif saved.config.init_from is None and saved.config.sft is None:
        how = f"from random weights {how}"
    return f"A {what} of {parameters:,} parameters, {tuned}trained {how}."


def _is_imported(*saved: Checkpoint) -> bool:
    """An imported model's recipe, batch and data are not known, only its counters."""
    return any("imported_from" in one.state() for one in saved)


def _shape(saved: SavedModel, architecture: str) -> Iterator[tuple[str, str]]:
    config = saved.config.model
    total, active = (config.num_parameters(active=active) for active in (False, True))
    norms = ", RMSNorm of q and k" if config.qk_norm else ""
    yield "architecture", f"{architecture}: RMSNorm{norms}, RoPE, SwiGLU, no biases"
    yield "parameters", f"{total:,}" + (f", {active:,} active per token" * (active != total))
    yield "layers x width", f"{config.num_layers} x {config.hidden_size:,}"
    heads = f"{config.num_attention_heads} query, {config.num_kv_heads} key and value"
    yield "attention heads", f"{heads}, of size {config.head_size}"
    experts = f"{config.num_experts} experts, {config.num_experts_per_token} active, each "
    yield "MLP", (experts if config.is_moe else "") + f"{config.expert_intermediate_size:,} wide"
    tied = "shared with" if config.tie_word_embeddings else "apart from"
    yield "vocabulary", f"{config.vocab_size:,} tokens, embedding {tied} the output head"
    yield "context", f"{saved.config.seq_len:,} tokens"


def _training(saved: SavedModel) -> Iterator[tuple[str, str]]:
    config, state = saved.config, saved.checkpoint.state()
    if origin := _origin(config):
        yield "started from", origin
    tokens, step = state.get("tokens"), saved.checkpoint.step
    length = f"{tokens:,} in {step:,} steps" if tokens else f"{step:,} steps"
    if _is_imported(saved.checkpoint):
        yield "tokens", length
        yield "data", "not known here"
    else:
        yield "tokens", f"{length} of {config.batch_size} x {config.seq_len:,}"
        yield "data", "<br>".join(map(_data, _specs(config)))
        yield "recipe", recipe(config).removeprefix("recipe ")
    unit = "nats per token"
    if (loss := _last_loss(saved)) is not None:
        yield "final training loss", f"{loss:.4f} {unit}"
    if (loss := state.get("val_loss")) is not None:
        held = "conversations" if saved.is_chat else "documents"
        perplexity = f"perplexity {math.exp(min(loss, 700.0)):.2f}"
        at = state.get("val_step")
        when = "" if at in (None, step) else f", at step {at:,}"
        yield "final validation loss", f"{loss:.4f} {unit} ({perplexity}) on held-out {held}{when}"


def _origin(config: TrainConfig) -> str | None:
    """The text says whose weights a run started from, and what those were trained on."""
    path = config.sft.checkpoint if config.sft else config.init_from
    if path is None:
        return None
    run = run_of(path)
    name = f"`{run.name or path.name}`"
    try:
        before = TrainConfig.read(run / CONFIG_FILE)
        saved = checkpoint.find(RunFolder(run).checkpoints)
        if (run / checkpoint.STATE_FILE).is_file():  # a checkpoint that was copied elsewhere
            saved.append(Checkpoint.at(run))
        is_known = not _is_imported(*saved)
    except UserError:  # moved, or on another machine
        is_known = False
    if not is_known:
        return f"{name}, whose training is not known here"
    return f"{name}, trained on {', '.join(map(_data, _specs(before)))}"


def _specs(config: TrainConfig) -> Sequence[Spec]:
    """The specs are those of the run; where its files are gone, a path with "=" in it may look like
    one with a weight, and is taken as it is."""
    try:
        return parse_specs(config.data, bare_weight=1.0)
    except UserError:
        return [Spec("files", text, 1.0, text) for text in config.data]


def _data(spec: Spec) -> str:
    """The text names a source, of local ones the last part of their paths."""
    name = spec.text
    if spec.kind == "files":
        name = Path(spec.location).name or "files"
    elif spec.kind == "shards":
        name = f"shards:{Path(spec.location).name}"
    weight = "" if spec.weight == 1 else f" (weight {spec.weight:g})"
    local = "local " if spec.kind in ("files", "shards") else ""
    return f"{local}`{name}`{weight}"


def _last_loss(saved: SavedModel) -> float | None:
    """The training loss is that of the last record up to the checkpoint, if the run's log is
    there."""
    last = None
    for record in read_records(RunFolder(run_of(saved.checkpoint.path)).metrics):
        loss = record.get("loss")
        if record["step"] <= saved.checkpoint.step and isinstance(loss, float):
            last = loss
    return last


def _usage(saved: SavedModel) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this one, or its name on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
    ]
    if saved.is_chat:
        lines += [
            'messages = [{"role": "user", "content": "Who are you?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("The history of", return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=100)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
    ]
    return "\n".join(["```python", *lines, "```"])


def _limits(saved: SavedModel) -> str:
    lines = [
        "Not a source of facts: it says what sounds likely, names and numbers included.",
        "Not filtered: it can say whatever its data says, biases and private text included.",
        "Not to decide anything about people, nor to advise on health, law or money.",
        f"Not measured beyond the losses above, nor trained on texts of more than "
        f"{saved.config.seq_len:,} tokens.",
    ]
    if not saved.is_chat:
        lines.append("Not an assistant: it continues a text and does not follow instructions.")
    return "\n".join(f"- {line}" for line in lines)


def _table(rows: Iterator[tuple[str, str]]) -> str:
    cells = [("", ""), ("---", "---"), *rows]
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in cells)


def _cell(text: str) -> str:
    """The text of a cell has no end of line, and no bar that is not escaped."""
    return " ".join(text.split()).replace("|", "\\|")
