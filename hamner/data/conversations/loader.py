"""`ConversationLoader` gives batches of packed conversations, and resumes exactly."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.data.conversations.examples import ConversationSource, Example
from hamner.data.conversations.packing import lay_out, pack
from hamner.data.loader import VALIDATION_SEED, DataConfig
from hamner.data.shuffle import State, permutation
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError

STATE_VERSION = 1


class ConversationLoader:
    """The loader gives batches without end, as `hamner.data.loader.TrainLoader` does for text.

    Every epoch packs its conversations anew, as a function of seed and epoch alone. So the state
    is the number of the next row.

    Raises:
        UserError: nothing to train on.
    """

    def __init__(
        self,
        sources: Sequence[ConversationSource],
        tokenizer: Tokenizer,
        config: DataConfig | TrainConfig,
    ) -> None:
        if not any(source.train for source in sources):
            names = " ".join(source.name for source in sources)
            if held_out := sum(len(source.validation) for source in sources):
                raise UserError(
                    f"--data {names}: no conversation to train on, as --val-fraction holds out all "
                    f"{held_out:,}; lower it (0 holds out none) or give more"
                )
            raise UserError(f"--data {names}: no conversation to train on")
        self._sources, self._tokenizer, self._config = list(sources), tokenizer, config
        self.pin_memory = False
        self._header = {
            "version": STATE_VERSION,
            "tokenizer": tokenizer.fingerprint,
            "seed": config.seed,
            "seq_len": config.seq_len,
            **_digests(sources),
        }
        self._position: State = {"epoch": 0, "row": 0}
        # The epoch that is read, and the next one at its end.
        self._epoch_rows = lru_cache(maxsize=2)(self._pack_epoch)

    def rows_in_epoch(self, epoch: int) -> int:
        """The epochs differ by a few rows, since each is packed anew."""
        return len(self._epoch_rows(epoch))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def next_batch(self, is_stopped: Callable[[], bool]) -> Batch | None:
        """`next_batch` gives None once `is_stopped`; it never waits."""
        return None if is_stopped() else next(self)

    def progress(self) -> dict[str, State]:
        """The counters are none: conversations are in memory, no source of theirs can be lost."""
        return {}

    def __next__(self) -> Batch:
        epoch, row = self._position["epoch"], self._position["row"]
        rows: list[list[Example]] = []
        while len(rows) < self._config.batch_size:
            found = self._epoch_rows(epoch)[row : row + self._config.batch_size - len(rows)]
            rows += found
            row += len(found)
            if row >= self.rows_in_epoch(epoch):
                epoch, row = epoch + 1, 0
        batch = lay_out(rows, self._config.seq_len, self._tokenizer.eot_id)
        self._position = {"epoch": epoch, "row": row}
        return batch.pin_memory() if self.pin_memory else batch

    def state_dict(self) -> State:
        """The state is that after the last batch handed out: JSON."""
        return {**self._header, "position": self._position}

    def load_state_dict(self, state: State) -> None:
        """The loader goes on where `state_dict` was taken; the batch size may differ.

        Raises:
            UserError: the state is of other conversations, another tokenizer, seed or length.
        """
        flags = {"version": "Hamner", "conversations": "--data or --val-fraction"}
        flags |= {"tokenizer": "--tokenizer", "seed": "--seed", "seq_len": "--seq-len"}
        if "learned" in state:  # earlier versions' states do not say it
            flags["learned"] = "what --data says is learned"
        for name, flag in flags.items():
            if state.get(name) != self._header[name]:
                raise UserError(
                    f"--resume: {flag} is not what the run was saved with "
                    f"({name} {state.get(name)} then, {self._header[name]} now), so its data "
                    "cannot go on from there"
                )
        self._position = state["position"]

    def close(self) -> None:
        """Nothing runs in the background here."""

    def _pack_epoch(self, epoch: int) -> list[list[Example]]:
        examples: list[Example] = []
        for number, source in enumerate(self._sources):
            repeats = self._repeats(number, source, epoch)
            for example, times in zip(source.train, repeats, strict=True):
                examples += [example] * times
        shuffled = [examples[i] for i in permutation(len(examples), self._config.seed, epoch)]
        rows = pack(shuffled, self._config.seq_len)
        # The last rows are the ones with room left: they must not always come last.
        return [rows[number] for number in permutation(len(rows), self._config.seed, epoch, 1)]

    def _repeats(self, number: int, source: ConversationSource, epoch: int) -> list[int]:
        """The numbers say how often each example comes: `weight` on average over the epochs.

        The examples start at evenly spread phases, so with a weight of 0.5 each epoch takes
        another half of them.
        """
        count, weight = len(source.train), source.weight
        phases = permutation(count, self._config.seed, number) / max(1, count)
        return [
            math.floor((epoch + 1) * weight + p) - math.floor(epoch * weight + p) for p in phases
        ]


def validation_batch(
    sources: Sequence[ConversationSource], tokenizer: Tokenizer, seq_len: int, max_tokens: int
) -> Batch:
    """The batch has the held-out conversations packed into rows, the same whatever the seed.

    Of more than `max_tokens`, a random choice is taken; there are no rows when nothing is held out.
    """
    examples = [example for source in sources for example in source.validation]
    chosen: list[Example] = []
    positions = 0
    for index in permutation(len(examples), VALIDATION_SEED):
        positions += examples[index].length
        if positions > max_tokens:
            break
        chosen.append(examples[index])
    return lay_out(pack(chosen, seq_len), seq_len, tokenizer.eot_id)


def _digests(sources: Sequence[ConversationSource]) -> dict[str, str]:
    """The digests are of all that decides what is read, examples and weights in order, and of what
    is learned of it."""
    read, learned = hashlib.sha256(), hashlib.sha256()
    for source in sources:
        read.update(f"{source.weight} {len(source.train)}".encode())
        for example in source.train:
            read.update(len(example.ids).to_bytes(8, "little"))
            read.update(example.ids.tobytes())
            learned.update(example.learned.tobytes())
    return {"conversations": read.hexdigest(), "learned": learned.hexdigest()}
