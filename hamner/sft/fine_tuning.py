"""Fine-tuning is the training loop on conversations, from a checkpoint's weights."""

import math
from dataclasses import replace

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.options import total_tokens
from hamner.config.sft import SftConfig
from hamner.config.train import TrainConfig
from hamner.data.conversations import lint
from hamner.data.conversations.examples import UnusableRows, load_examples, most_used_system
from hamner.data.conversations.loader import ConversationLoader, validation_batch
from hamner.data.tokenizer import Tokenizer
from hamner.parallel.ranks import Rank
from hamner.progress import Status, waiting
from hamner.train.data import RunData
from hamner.train.display import open_console
from hamner.train.loop import train
from hamner.train.messages import TrainResult

WARMUP_SHARE = 10
"""the warm-up is at most a tenth of the run"""
LITTLE = 4e-3
"""steps times peak learning rate below which a run teaches little: 2.8e-3 left the held-out answers
of option a at 1.9 nats, 5.6e-3 at 0.84 (docs/recipes.md)"""


def fine_tune(config: SftConfig) -> TrainResult:
    """The function fine-tunes as `config` says, from its checkpoint or where its run stopped.

    Raises:
        UserError: The configuration, the checkpoint, the conversations or the run folder does not
            allow it; nothing is written before all were read.
    """
    training = config.training()
    run = RunFolder(training.folder)
    run.check(resume=training.resume)
    goes_on = training.resume and checkpoint.find(run.checkpoints)
    initial = None if goes_on else find_saved_model(config.sft.checkpoint)

    tokenizer = initial.tokenizer if initial else run.open_tokenizer(training)
    with waiting("reading the conversations") as status:
        try:
            sources = load_examples(training, tokenizer, status)
        except UnusableRows as error:
            lint.show_unusable(error, open_console())
            raise
    training = replace(training, sft=replace(config.sft, system=most_used_system(sources)))
    if Rank.read().is_main:
        lint.show(sources, tokenizer, open_console())
    loader = ConversationLoader(sources, tokenizer, training)
    validation = validation_batch(sources, tokenizer, training.seq_len, training.eval_tokens)

    def open_data(_: TrainConfig, __: Tokenizer, pin_memory: bool, ___: Status) -> RunData:
        loader.pin_memory = pin_memory
        return RunData(loader, validation)

    with waiting("packing them into rows"):
        rows = loader.rows_in_epoch(0)
    planned = scheduled(training, config.sft.epochs, rows)
    if not goes_on and Rank.read().is_main and (advice := advise(planned)):
        open_console().print(advice, soft_wrap=True, highlight=False, markup=False)
    return train(planned, open_data=open_data, initial=initial)


def scheduled(config: TrainConfig, epochs: float, rows_per_epoch: int) -> TrainConfig:
    """The function gives a run the length and the rhythm that follow from the amount of data."""
    epoch = math.ceil(rows_per_epoch / config.batch_size)
    tokens, steps = None, config.steps
    if steps is None:
        steps = math.ceil(epochs * rows_per_epoch / config.batch_size)
        tokens = float(steps * config.tokens_per_step)
    return replace(
        config,
        tokens=tokens,
        warmup_steps=min(config.warmup_steps, steps // WARMUP_SHARE),
        eval_every=min(config.eval_every, epoch),
    )


def advise(config: TrainConfig) -> str | None:
    """The function says how to learn more, where a run is short for its learning rate."""
    steps = total_tokens(config) // config.tokens_per_step
    if steps * config.lr >= LITTLE:
        return None
    return (
        f"{steps:,} step{'s' if steps > 1 else ''} with a peak --lr of {config.lr:g} will teach "
        "little: of 350 KB of conversations, 28 steps, option a learned least with 1e-5 and most "
        "with --lr 1e-4 --epochs 6 (docs/recipes.md)"
    )
