"""`python -m hamner.data` prepares shards and trains a tokenizer."""

import sys

if __package__ != "hamner.data":
    print("error: start this with python -m hamner.data", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hamner.cli import NameOrPath, read_flags, run_command
from hamner.data.bad_rows import DEFAULT_SHARE, BadRows, lines_of
from hamner.data.chat_tokens import reserve_chat_tokens
from hamner.data.documents import split_of
from hamner.data.prepare import BAD_ROWS, prepare
from hamner.data.sources import open_text_source
from hamner.data.specs import parse_specs
from hamner.data.tokenizer import MIN_VOCAB_SIZE, VOCAB_SIZE, load_tokenizer, train_tokenizer
from hamner.errors import UserError
from hamner.files import refuse_pipe, require_writable, writing
from hamner.progress import Status, waiting

TOKENIZER_BEGINS = b'{"version"'
"""what train-tokenizer writes"""


@dataclass(frozen=True)
class Prepare:
    """`prepare` tokenizes documents once into shards that training reads with --data shards:DIR."""

    output: Path
    """folder to write; a repeated command goes on with an unfinished one"""
    data: tuple[str, ...] = ()
    """SPEC to read, repeatable: builtin, a file, folder or glob of .txt, .jsonl or .parquet, or
    hf:owner/name[:config[:split]]; none means builtin"""
    tokenizer: NameOrPath = "builtin"
    """builtin, the path of a tokenizer.json, or a Hugging Face name owner/name"""
    vocab_size: int | None = None
    """vocabulary of the model (entries), to cut the built-in tokenizer; default whole"""
    reserve_chat_tokens: bool = False
    """as --reserve-chat-tokens of hamner.train, for a run that has it"""
    shard_tokens: int = 100_000_000
    """size of a shard (tokens); one is held in memory at 2 bytes a token"""
    val_fraction: float = 0.01
    """share of documents held out for validation (0 to 1)"""
    bad_rows: float = DEFAULT_SHARE
    """share of a source's rows that may hold no document and are passed over (0 to 1)"""

    def run(self) -> None:
        _check_shares(self.val_fraction, self.bad_rows)
        if self.shard_tokens < 1:
            raise UserError(f"--shard-tokens {self.shard_tokens}: must be at least 1")
        tokenizer = load_tokenizer(self.tokenizer, self.vocab_size)
        if self.reserve_chat_tokens:
            tokenizer = reserve_chat_tokens(tokenizer, self.vocab_size)
        with waiting("preparing shards") as status:
            index = prepare(
                self.data,
                self.output,
                tokenizer,
                shard_tokens=self.shard_tokens,
                val_fraction=self.val_fraction,
                bad_rows=self.bad_rows,
                status=status,
            )
        for split in ("train", "validation"):
            shards = [shard for shard in index["shards"] if shard["split"] == split]
            tokens = sum(shard["tokens"] for shard in shards)
            documents = sum(shard["documents"] for shard in shards)
            print(f"{split}: {tokens:,} tokens, {documents:,} documents, {len(shards)} shards")
        for line in lines_of(index.get("bad_rows", {}).values(), self.output / BAD_ROWS):
            print(line)
        print(
            f"{index['skipped']:,} empty documents skipped; train with --data shards:{self.output}"
        )


@dataclass(frozen=True)
class TrainTokenizer:
    """`train-tokenizer` learns a byte-level BPE from text; validation documents are left out."""

    output: Path
    """the tokenizer.json to write"""
    data: tuple[str, ...] = ()
    """SPEC to read, repeatable: builtin, a file, folder or glob of .txt, .jsonl or .parquet, or
    hf:owner/name[:config[:split]]; none means builtin"""
    vocab_size: int = VOCAB_SIZE
    """entries, the 5 special tokens and the 256 bytes included"""
    max_mib: int = 1024
    """text to read from each SPEC at most (MiB)"""
    val_fraction: float = 0.01
    """share of documents held out for validation (0 to 1)"""
    bad_rows: float = DEFAULT_SHARE
    """share of a source's rows that may hold no document and are passed over (0 to 1)"""

    def run(self) -> None:
        _check_shares(self.val_fraction, self.bad_rows)
        if self.max_mib < 1:
            raise UserError(f"--max-mib {self.max_mib}: must be at least 1")
        if not MIN_VOCAB_SIZE <= self.vocab_size < 2**31:
            raise UserError(
                f"--vocab-size {self.vocab_size}: must be at least {MIN_VOCAB_SIZE}, the special "
                "tokens and the 256 bytes, and below 2^31"
            )
        require_writable(self.output, "--output", begins=TOKENIZER_BEGINS)
        refuse_pipe(self.output, f"--output {self.output}")
        with waiting(f"learning {self.vocab_size:,} entries") as status:
            tokenizer = train_tokenizer(self._texts(status), self.vocab_size)
        with writing(f"--output {self.output}"):
            tokenizer.save(self.output)
        print(f"{self.output}: {tokenizer.vocab_size:,} entries, SHA-256 {tokenizer.fingerprint}")

    def _texts(self, status: Status) -> Iterator[str]:
        for spec in parse_specs(self.data):
            source = open_text_source(spec, BadRows(spec.text, self.bad_rows))
            with status.task(f"reading {spec.text}", unit="bytes") as task:
                task.note = f"at most {self.max_mib} MiB of text"
                for text, _ in source.documents(seed=0, epoch=0, state=None):
                    if split_of(text, self.val_fraction) == "train":
                        yield text
                        task.advance(len(text.encode()))
                    if task.done >= self.max_mib * 2**20:
                        break


def _check_shares(val_fraction: float, bad_rows: float) -> None:
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: must be at least 0 and less than 1")
    if not 0 <= bad_rows <= 1:
        raise UserError(f"--bad-rows {bad_rows}: must be at least 0 and at most 1")


def main(arguments: Sequence[str]) -> None:
    """The function parses the arguments and runs the subcommand."""
    what = "Tokenize data once into shards, or train a tokenizer."
    read_flags(Prepare | TrainTokenizer, arguments, "hamner.data", description=what).run()


if __name__ == "__main__":
    run_command(main)
