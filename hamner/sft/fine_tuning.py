"""Fine-tuning: the trainer on conversations, from a checkpoint's weights."""

import math
from dataclasses import replace

from rich.console import Console

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.sft import SftConfig
from hamner.data.conversations import lint
from hamner.data.conversations.examples import load_examples
from hamner.data.conversations.loader import ConversationLoader, validation_batch
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.parallel.ranks import Rank
from hamner.train.loop import RunData, TrainResult, train

WARMUP_SHARE = 10
"""the warm-up is at most a tenth of the run"""


def fine_tune(config: SftConfig) -> TrainResult:
    """Fine-tune as `config` says, from its checkpoint or from where its run stopped.

    Raises:
        UserError: the configuration, the checkpoint, the conversations or the run folder does not
            allow it; nothing is written before all were read.
    """
    run = RunFolder(config.folder)
    run.check(resume=config.resume)
    goes_on = config.resume and checkpoint.find(run.checkpoints)
    initial = None if goes_on else find_saved_model(config.checkpoint).checkpoint

    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    sources = load_examples(config.data, tokenizer, config.seq_len, config.val_fraction)
    if Rank.read().is_main:
        lint.show(sources, tokenizer, Console(highlight=False))
    loader = ConversationLoader(
        sources,
        tokenizer,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    validation = validation_batch(sources, tokenizer, config.seq_len, config.eval_tokens)

    def open_data(_: SftConfig, __: Tokenizer, pin_memory: bool) -> RunData:
        loader.pin_memory = pin_memory
        return RunData(loader, validation)

    return train(scheduled(config, loader.rows_in_epoch(0)), open_data, initial)


def scheduled(config: SftConfig, rows_per_epoch: int) -> SftConfig:
    """The flags with the rhythm that follows from the amount of data."""
    tokens = None
    if config.steps is None:
        steps = math.ceil(config.epochs * rows_per_epoch / config.batch_size)
        tokens = float(steps * config.tokens_per_step)
    config = replace(config, tokens=tokens)
    steps = config.total_tokens // config.tokens_per_step
    epoch = math.ceil(rows_per_epoch / config.batch_size)
    return replace(
        config,
        warmup_steps=min(config.warmup_steps, steps // WARMUP_SHARE),
        eval_every=min(config.eval_every, epoch),
    )
