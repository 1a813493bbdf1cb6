"""Prompts -> caption states, by the very text encoder the plan names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paris_swarm.dht_schemas.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def encode_prompts(plan: Plan, prompts: Sequence[str]) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
    """float16 [P, L, D] and lengths int16 [P].

    Raises:
        ValueError: the plan's encoder is not installed here, or its weights have another digest.
    """
    from paris_swarm.expert.data.encoders import MiniLMTextEncoder

    asked = plan.data["text"]
    encoder = MiniLMTextEncoder()
    for what in ("name", "digest"):
        if asked[what] != getattr(encoder, what):
            raise ValueError(
                f"the plan's text encoder has {what} {asked[what]}, this version has {getattr(encoder, what)}: "
                "use the paris-swarm release that the plan was made with"
            )
    states, lengths = encoder.encode(list(prompts))
    return states, lengths
