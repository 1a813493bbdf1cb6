"""Prompts -> caption states, by the very text encoder the plan names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paris_swarm.cli.encoders import is_clip
from paris_swarm.dht_schemas.plan import OpenedPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def encode_prompts(
    plan: OpenedPlan,
    prompts: Sequence[str],
    *,
    folder: Path,
    place: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
    """float16 [P, L, D] and lengths int16 [P].

    folder: the assembled folder, which may hold a text encoder; place: another folder or hub name of it; note: is told
    what a person should know, where a prompt is longer than the encoder reads or `place` is of no use.

    Raises:
        EncoderError: the plan's encoder is not at hand, or what is has another digest.
        ValueError: the built-in encoder of this version is not the plan's, or the plan does not say which is.
    """
    from paris_swarm.expert.data.encoders import MiniLMTextEncoder
    from paris_swarm.router.encoder_files import plan_clip
    from paris_swarm.router.plan_facts import encoder_facts

    if is_clip(plan):
        own = place is None and (folder / "text_encoder" / "config.json").is_file()
        where = str(folder / "text_encoder") if own else place
        clip = plan_clip(plan, where, tokenizer=folder / "tokenizer" if own else None)
        states, lengths = clip.encode(list(prompts))
        said = clip.tokenizer(list(prompts), truncation=True, max_length=clip.max_tokens)["input_ids"]
        counts, most = [len(ids) for ids in said], clip.max_tokens  # `lengths` counts the padding too
    else:
        minilm = MiniLMTextEncoder()
        asked = encoder_facts(plan.plan.data, "text", "its text encoder")
        for what in ("name", "digest"):
            if asked[what] != getattr(minilm, what):
                raise ValueError(
                    f"the plan's text encoder has {what} {asked[what]}, this version has {getattr(minilm, what)}: "
                    "use the paris-swarm release that the plan was made with"
                )
        if place is not None:
            note(f"--text-encoder is not used: the plan's is {minilm.name}, which is installed with this version.")
        states, lengths = minilm.encode(list(prompts))
        counts, most = lengths.tolist(), minilm.max_tokens
    for number, count in enumerate(counts, 1):
        if count >= most:
            note(
                f"Prompt {number} takes all {most} tokens that the plan's text encoder reads: what follows is not seen."
            )
    return states, lengths
