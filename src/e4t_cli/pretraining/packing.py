"""What stands at any moment of pre-training, as a pack, and what whoever watches is shown."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from e4t_cli.base_model import TextToImageModel
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import WordEmbeddingEncoder
from e4t_cli.pretrained import PretrainedDomain, facts_about, usual_limits


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainingStep:
    """What `on_step` sees after each optimiser step.

    Args:
        step: steps done, 1 …
        encoder, offsets: in training; look, do not touch.
        diffusion, penalty: eq. 4 and eq. 2 of this step's samples (batch,), detached; with several
            processes, of this one's.
        snapshot: call it for a copy of the domain as it is now, ready for `tune`.
    """

    step: int
    encoder: WordEmbeddingEncoder
    offsets: WeightOffsets
    diffusion: Tensor
    penalty: Tensor
    snapshot: Callable[[], PretrainedDomain]


def packed(
    model: TextToImageModel,
    encoder: WordEmbeddingEncoder,
    offsets: WeightOffsets,
    *,
    descriptor: str,
    images: int,
    **stated: Any,
) -> PretrainedDomain:
    """Return copies of what is in training, in main memory, as a pack for the base.

    Args:
        images: how many pictures it has learned from.
        stated: other fields of `PretrainedDomain`.
    """
    return PretrainedDomain(
        encoder=copy.deepcopy(encoder).cpu(),
        offsets={path: (a.cpu(), b.cpu()) for path, (a, b) in offsets.factors().items()},
        descriptor=descriptor,
        images=images,
        limits=usual_limits(descriptor, model.base.name, images),
        **facts_about(model),
        **stated,
    )
