"""How a drafter lies in a folder: model.safetensors and config.json, as serving engines read them.

Each kind of drafter has one `CheckpointFormat`, which knows names, fields and spellings, and no
files: `convert/heads` reads and writes the folders, and names no drafter. `dims` are the drafter's
own dimensions throughout, `captured_layers` the 0-based target layers whose outputs it reads.

D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import Tree


@dataclasses.dataclass(frozen=True)
class VocabularyTensor:
    """A tensor that says which tokens can be drafted."""

    shape: tuple[int, ...]
    dtype: str  # the safetensors code that an export has
    readable: tuple[str, ...]  # the codes that a published folder may have
    required: bool  # of a published folder; an export always holds it


class CheckpointFormat(abc.ABC):
    """Names, fields and spellings of one kind of drafter. Instances hold nothing."""

    architecture: ClassVar[str]  # of config.json's `architectures`, in an export

    # ----------------------------------------------------------------------------------- writing
    @abc.abstractmethod
    def config(
        self,
        dims: Any,
        captured_layers: Sequence[int],
        target_config: Mapping[str, Any],
        target_name: str,
    ) -> dict[str, Any]:
        """config.json of an export, JSON-able."""

    @abc.abstractmethod
    def vocabulary_tensors(self, vocabulary: DraftVocabulary) -> dict[str, np.ndarray]:
        """The tensors beside the parameters; empty where a drafter has no draft vocabulary."""

    @abc.abstractmethod
    def flags(self, dims: Any) -> frozenset[str]:
        """Switches of config.json that change what is computed, and that not all engines read."""

    # ------------------------------------------------------------------ checking what was written
    @abc.abstractmethod
    def config_problems(
        self, config: Mapping[str, Any], dims: Any, captured_layers: Sequence[int]
    ) -> list[str]:
        """Fields of a written config.json that do not describe the drafter."""

    @abc.abstractmethod
    def vocabulary_problems(
        self, tensors: Mapping[str, np.ndarray], vocabulary: DraftVocabulary
    ) -> list[str]:
        """What written tensors say differently about the draft vocabulary."""

    @abc.abstractmethod
    def twin_differences(
        self, folder: Path, params: Tree, dims: Any, steps: int, seed: int = 0
    ) -> dict[str, float]:
        """Compares the drafter with a NumPy twin that reads nothing but the written folder.

        -> what was compared: max |twin - trained| / rms(trained) of its logits, where `trained` are
        the parameters rounded to bfloat16. Embeddings and hidden states are random.
        """

    # ----------------------------------------------------------------------------------- reading
    @abc.abstractmethod
    def recognizes(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """Whether a folder with this config.json and these tensors holds this kind of drafter."""

    @abc.abstractmethod
    def read_config(self, config: Mapping[str, Any]) -> tuple[Any, tuple[int, ...] | None]:
        """config.json, of any JSON, in any spelling -> dims, captured layers.

        Captured layers are None where the file names none: then engines capture the default ones.
        DrafterError lists all fields that are missing, wrong, or not understood.
        """

    @abc.abstractmethod
    def parameter_table(self, dims: Any, tensor_names: Collection[str]) -> Tree:
        """The table of parameters under the tensor names that a folder has for them."""

    @abc.abstractmethod
    def vocabulary_layout(self, dims: Any) -> dict[str, VocabularyTensor]:
        """What `read_vocabulary` reads, by tensor name."""

    @abc.abstractmethod
    def read_vocabulary(self, tensors: Mapping[str, np.ndarray], dims: Any) -> DraftVocabulary:
        """The draft vocabulary; VocabularyError where its tensors contradict each other."""

    @property
    @abc.abstractmethod
    def embedding_copy(self) -> str | None:
        """Tensor name of the target's token embedding where a folder repeats it [V, H].

        The drafter reads the target's own, so a folder that has trained another is refused.
        """

    @property
    @abc.abstractmethod
    def training_only(self) -> frozenset[str]:
        """Tensors that trainers save and that no draft depends on."""

    @abc.abstractmethod
    def differences(self, dims: Any, expected: Any) -> list[str]:
        """A line for every dimension that differs, naming the key to set where one sets it."""

    @abc.abstractmethod
    def with_fields_of_checkpoint(self, dims: Any, saved: Any) -> Any:
        """`dims` with what no key chooses, and a warm start therefore takes from the folder."""
