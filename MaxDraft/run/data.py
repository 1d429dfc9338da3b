"""The data side of a run: conversations -> packed rows, draft vocabulary, batches, prompts.

input_pipeline gets plain values: no Config, no devices. Of the target and of the mesh it is told a
few numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from MaxDraft import storage
from MaxDraft.drafts import vocabulary
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.input_pipeline import batches, dataset, packing, summary
from MaxDraft.input_pipeline.chat_template import ChatEncoder, check_vocabulary
from MaxDraft.input_pipeline.dataset import Dataset
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.packing import Rows
from MaxDraft.input_pipeline.tokenizer_files import load_tokenizer
from MaxDraft.pyconfig import Config


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run learns from and is measured on."""

    config: Config
    encoder: ChatEncoder
    dataset: Dataset
    train_rows: Rows  # of the whole run, all epochs
    held_out_rows: Rows
    rows_per_step: int  # global batch: all devices, all micro-batches
    vocab_size: int  # V
    process_index: int
    process_count: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.config.steps != -1:
            return self.config.steps
        steps = len(self.train_rows) // self.rows_per_step
        if steps == 0:
            raise DataError(
                f"{self.config.num_epoch} epochs of this data pack into {len(self.train_rows)} "
                f"rows, fewer than the {self.rows_per_step} of one optimizer step; give more data, "
                f"or lower per_device_batch_size or gradient_accumulation_steps"
            )
        return steps

    @property
    def fingerprint(self) -> str:
        """Changes where training would: data, template, split."""
        return self.dataset.fingerprint

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int64 [V]: how often the assistant wrote each token of the training conversations."""
        return self.dataset.train.assistant_token_counts(self.vocab_size)

    def select_vocabulary(self, draft_vocab_size: int) -> DraftVocabulary:
        """The most frequent assistant tokens, and the special tokens of its turns."""
        required = self.encoder.special_ids(self.counts)
        return vocabulary.select(self.counts, required, draft_vocab_size)

    def summary(self, chosen: DraftVocabulary) -> summary.Summary:
        """The numbers of input_pipeline/summary.py."""
        return summary.summarize(
            self.dataset,
            self.train_rows,
            self.config.max_target_length,
            summary.Coverage(chosen.size, self.vocab_size, chosen.coverage(self.counts)),
        )

    @property
    def supervised_share(self) -> float:
        """Share of the training tokens that the assistant wrote: about the supervised ones."""
        return summary.Side.from_documents(self.dataset.train).assistant_share

    def sample(self) -> str:
        """The first training conversation, decoded, the assistant's tokens in brackets."""
        return summary.format_sample(*self.dataset.train[0], self.encoder.decode)

    def train_batches(self, batches_read: int) -> Iterator[batches.Batch]:
        """This host's batches [rows, T] of the run, from global batch `batches_read` on."""
        return self._iterator(self.dataset.train, self.train_rows, False, start=batches_read)

    def held_out_batches(self, limit: int) -> Iterator[batches.Batch]:
        """This host's batches of the held-out rows, each row once; at most `limit`, -1: all."""
        iterator = self._iterator(self.dataset.held_out, self.held_out_rows, True)
        for number, batch in enumerate(iterator):
            if number == limit:
                break
            yield batch
        iterator.close()

    def prompts(self, target_length: int) -> list[list[int]]:
        """Up to decode_num_prompts different held-out prompts that leave room for a reply.

        A prompt is what stands before the first reply that is learnt, as serving would see it.
        target_length: positions that the target knows.
        """
        count = self.config.decode_num_prompts
        max_length = target_length - self.config.decode_max_new_tokens
        prompts: dict[tuple[int, ...], None] = {}  # an ordered set
        for i in range(len(self.dataset.held_out)):
            prompt = self.dataset.held_out.prompt(i)
            if 0 < len(prompt) <= max_length:
                prompts[tuple(prompt.tolist())] = None
            if len(prompts) == count:
                break
        if not prompts:
            raise DataError(
                f"no held-out prompt leaves room for decode_max_new_tokens="
                f"{self.config.decode_max_new_tokens} among the {target_length} positions of the "
                f"target; lower decode_max_new_tokens"
            )
        return [list(prompt) for prompt in prompts]

    def _iterator(self, documents: Any, rows: Rows, pad_last: bool, start: int = 0):
        return batches.make_batch_iterator(
            documents,
            rows,
            max_target_length=self.config.max_target_length,
            global_batch_size=self.rows_per_step,
            host=self.process_index,
            num_hosts=self.process_count,
            pad_last=pad_last,
            start=start,
            worker_count=self.config.grain_worker_count,
            prefetch_buffer_size=self.config.grain_prefetch_buffer_size,
        )


def open_data(
    config: Config,
    *,
    vocab_size: int,
    stop_token_ids: Collection[int],
    device_count: int,
    process_index: int,
    process_count: int,
    log: Callable[[str], None],
) -> RunData:
    """Tokenizer, encoded conversations and packed rows; DataError says what is wrong with them.

    vocab_size, stop_token_ids: of the target. device_count: of the whole mesh.
    """
    template = storage.as_path(config.chat_template) if config.chat_template else None
    tokenizer = load_tokenizer(config.tokenizer_directory, config.trust_remote_code, template)
    encoder = ChatEncoder(tokenizer, config.loss_turns, stop_token_ids)
    check_vocabulary(encoder, vocab_size)
    data = dataset.prepare_dataset(
        train_files=config.grain_train_files,
        eval_files=config.grain_eval_files,
        eval_fraction=config.eval_fraction,
        encoder=encoder,
        max_target_length=config.max_target_length,
        truncation_policy=config.truncation_policy,
        max_skipped_fraction=config.max_skipped_fraction,
        seed=config.data_shuffle_seed,
        cache_dir=config.run_directory / "data",
        vocab_size=vocab_size,
        log=log,
    )
    rows_per_step = config.per_device_batch_size * config.gradient_accumulation_steps * device_count
    train_rows = packing.pack_epochs(
        data.train.lengths,
        data.train.weights,
        config.max_target_length,
        config.data_shuffle_seed,
        config.num_epoch,
        min_rows=max(config.steps, 0) * rows_per_step,
    )
    held_out_rows = packing.pack_rows(
        data.held_out.lengths, config.max_target_length, config.data_shuffle_seed
    )
    return RunData(
        config=config,
        encoder=encoder,
        dataset=data,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        rows_per_step=rows_per_step,
        vocab_size=vocab_size,
        process_index=process_index,
        process_count=process_count,
    )
