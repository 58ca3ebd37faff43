"""Benchmarks of lm-evaluation-harness (an optional extra) on a model of ours.

The harness makes requests: how likely a text is after another, and what the model writes until a
stop. Everything else, from prompts to scores, is its own.
"""

from collections.abc import Sequence
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.evaluate.evaluation import GREEDY, MAX_LOGITS
from hamner.model.generate import Completion, Generator
from hamner.model.transformer import Transformer

DEFAULT_NEW_TOKENS = 256
"""of a generation whose task names no limit"""


class HarnessModel(TemplateLM):
    """A model as the harness sees one.

    Args:
        model: any option.
        tokenizer: the model's.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.hamner_tokenizer = model, tokenizer
        self.context = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.hamner_tokenizer.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text; nothing is ever put before it."""
        return self.hamner_tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids): log-probability of the continuation and
        whether it is what greedy decoding gives. Of what is too long, the end is kept."""
        sequences = [
            (context + continuation)[-self.context - 1 :] for _, context, continuation in requests
        ]
        lengths = [len(continuation) for _, _, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Alike lengths together, the longest first: little padding, and memory runs out at once.
        order = sorted(range(len(requests)), key=lambda i: -len(sequences[i]))
        while order:
            longest = len(sequences[order[0]]) - 1
            rows = max(1, MAX_LOGITS // max(1, longest * self.model.config.vocab_size))
            chunk, order = order[:rows], order[rows:]
            for index, result in zip(
                chunk, self._score([(sequences[i], lengths[i]) for i in chunk]), strict=True
            ):
                results[index] = result
        return results

    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Scores of the last so many tokens of each sequence, in one forward pass."""
        longest = max(len(ids) for ids, _ in rows) - 1
        # Padding comes after the text, where causal attention does not see it.
        padded = [ids[:-1] + [self.eot_token_id] * (longest + 1 - len(ids)) for ids, _ in rows]
        device = self.model.embed.weight.device
        log_probabilities = (
            self.model(torch.tensor(padded, device=device)).logits.float().log_softmax(-1)
        )
        results = []
        for (ids, length), row in zip(rows, log_probabilities, strict=True):
            # One too long for the context has lost its first tokens.
            length = min(length, len(ids) - 1)
            end = len(ids) - 1
            targets = torch.tensor(ids[len(ids) - length :], device=device)
            scores = row[end - length : end]
            total = scores.gather(-1, targets[:, None]).sum().item()
            results.append((total, bool((scores.argmax(-1) == targets).all())))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the context where they are longer."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            parts = [("", *map(list, make_disjoint_window(window))) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding writes until one of the task's stops."""
        generator = Generator(self.model, self.hamner_tokenizer)
        texts = []
        for request in requests:
            prompt, settings = request.args
            limit = min(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS), generator.context // 2)
            stops = settings.get("until") or []
            tokens = self.tok_encode(prompt) or [self.eot_token_id]
            completion = Completion(
                generator,
                tokens[-(generator.context - limit) :],
                GREEDY,
                max_new_tokens=limit,
                stop_ids={self.eot_token_id},
                stop_texts=[stops] if isinstance(stops, str) else stops,
            )
            texts.append(completion.run())
        return texts


def run_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    limit: int | None,
) -> dict[str, dict[str, float]]:
    """Score tasks of the harness.

    Args:
        model: any option.
        tokenizer: the model's.
        tasks: names known to the harness or defined in `folder`.
        folder: of more task files (YAML).
        limit: most examples of a task; None takes all.

    Returns:
        By task, its metrics by name, such as "acc,none".

    Raises:
        UserError: no such task, or its data cannot be had.
    """
    # Its own hundreds of task files take seconds to list.
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        where = f"in --task-folder {folder}" if folder else "known to lm-evaluation-harness"
        raise UserError(f"--tasks {unknown[0]}: no such task {where}")
    try:
        results = lm_eval.simple_evaluate(
            HarnessModel(model, tokenizer),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    # Each task's data has its own ways to fail; most are networks and files.
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--tasks {' '.join(tasks)}: cannot be run ({error})") from error
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results["results"].items()
    }
