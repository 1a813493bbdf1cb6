"""DDMPipeline: an assembled folder as a diffusers pipeline.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe("a red flag", seed=1).images[0].save("flag.png")

Draws what `paris-swarm sample` draws for the same seed, steps, strategy and guidance. Diffusers does not look at
lock.json: run `paris-swarm verify FOLDER` first, which compares this code with the lock and with what it would write.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from paris_swarm.expert.flow import from_pixels
from paris_swarm.router.draw import DrawStep, draw, vae_decoder
from paris_swarm.router.ensemble import Ensemble, NullText
from paris_swarm.router.png import Origin, provenance
from paris_swarm.router.samplers import SAMPLERS, Sampler, named_sampler, times

SOURCE = Path(__file__).read_bytes()
"""Of this file, as it was when it was loaded: what a saved pipeline carries along."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Picture(Image.Image):
    """A PIL image whose `info` says where it comes from, and whose PNG files say it too. `copy()` gives a plain one."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As PIL does; a PNG gets `info` as text chunks unless the caller brings his own `pnginfo`."""
        chunks = PngInfo()
        for keyword, value in self.info.items():
            chunks.add_itxt(str(keyword), str(value))
        super().save(fp, format, **{"pnginfo": chunks, **params})


@dataclass
class DDMOutput(BaseOutput):
    """images: as `output_type` says; info: for each what its PNG says (prompt, seed, strategy, steps, plan, assembly,
    experts; where experts are missing: `missing`, and `redirected`, the share of the router's weight that was theirs).
    weights: float32 [N, steps, K], what each expert counted for at each step."""

    images: Any
    info: list[dict[str, str]]
    weights: NDArray[np.float32]


class DDMPipeline(DiffusionPipeline):
    """Experts, their router, a text encoder; a VAE where the experts draw latents.

    experts: DDMExperts; router: DDMRouter, None for a single expert only; scheduler: any flow-matching scheduler of
    diffusers that asks for one velocity a step; text_encoder and tokenizer: stock classes of transformers, None where
    captions come encoded; vae: AutoencoderKL or None.
    """

    model_cpu_offload_seq = "text_encoder->router->experts->vae"
    _optional_components = ["router", "text_encoder", "tokenizer", "vae"]  # noqa: RUF012 (as diffusers reads it)

    # Without annotations: diffusers would compare components with the classes named, which differ from one load to the
    # next where they come from a folder.
    def __init__(self, experts, router, scheduler, text_encoder=None, tokenizer=None, vae=None):  # type: ignore[no-untyped-def]
        super().__init__()
        self.register_modules(
            experts=experts, router=router, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        strategy: str = "top-1",
        sampler: str | None = None,
        batch: int = 32,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_lengths: Sequence[int] | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> DDMOutput | tuple[Any, ...]:
        """`num_images_per_prompt` pictures for each prompt.

        Picture i depends on (seed, i) and its prompt, not on `batch`. Without a seed one is drawn from `generator`, or
        from torch's own where that is None too; `info` names it. strategy: "top-1", "top-2", ..., "full",
        "threshold-TAU", "adaptive", "sample" or "nucleus-P". sampler: "euler", "heun" or "dpm++"; None: `scheduler`.
        guidance_scale None: what the plan recommends. prompt_embeds [P, L, D] with prompt_lengths [P] (None: all L)
        stand in for prompts. output_type: "pil", "np" (float32 [N, H, W, C] in 0..1), "pt" (float32 [N, C, H, W] in
        0..1) or "latent" (what the experts drew, float32 [N, C, H, W]).

        Raises:
            ValueError: an argument that makes no sense here; the message says which. MissingExperts: no router.
        """
        model = self.experts.model_config
        about = self.experts.config.about or {}
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if self.vae is None and model.channels not in (1, 3) and output_type != "latent":
            raise ValueError("these experts draw latents: give the pipeline a vae, or ask for output_type='latent'")
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        for name, value in (("height", height), ("width", width)):
            if value not in (None, model.resolution * factor):
                raise ValueError(f"{name} must be {model.resolution * factor}, the size this model draws, got {value}")
        if guidance_scale is None:
            guidance_scale = float(about.get("guidance", 2.5))
        if seed is None:
            device = "cpu" if generator is None else generator.device
            seed = int(torch.randint(2**31, (1,), generator=generator, device=device))
        states, lengths, words = self._captions(prompt, prompt_embeds, prompt_lengths)
        null = self._null_text(negative_prompt)
        if null.length > states.shape[1]:  # a negative prompt that is longer than every prompt
            states = torch.nn.functional.pad(states, (0, 0, 0, null.length - states.shape[1]))
        device = self._execution_device
        ensemble = Ensemble(
            self.experts.config.num_experts,
            {k: functools.partial(self._network, k) for k in self.experts.here},
            self.router,
            null,
            allow_missing=True,
        )
        decode = self._decoder(output_type)
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(done: DrawStep) -> None:
                bar.update(1.0 / done.batches)

            drawn = draw(
                ensemble,
                states,
                lengths.tolist(),
                shape=(model.channels, model.resolution, model.resolution),
                n=num_images_per_prompt,
                strategy=strategy,
                sampler=by_scheduler(self.scheduler) if sampler is None else named_sampler(sampler),
                steps=num_inference_steps,
                guidance=guidance_scale,
                seed=seed,
                batch=batch,
                device=device,
                on_step=on_step,
                decode=decode,
            )
        self.maybe_free_model_hooks()
        more = {"negative_prompt": negative_prompt or ""}
        texts = [
            provenance(
                Origin(
                    prompts=(words[index // num_images_per_prompt],),
                    seed=seed,
                    strategy=strategy,
                    sampler=type(self.scheduler).__name__ if sampler is None else sampler,
                    steps=num_inference_steps,
                    guidance=guidance_scale,
                    plan_id=str(about.get("plan", "")),
                    assembly=str(about.get("assembly", "")),
                    missing=tuple(map(str, self.experts.missing)),
                ),
                shares=drawn.shares[index : index + 1],
                redirected=float(drawn.redirected[index]),
            )
            | {"index": str(index), **more}
            for index in range(len(drawn.images))
        ]
        info = [{key: value for key, value in text.items() if value} for text in texts]
        images = finished(drawn.images, output_type, info)
        return DDMOutput(images=images, info=info, weights=drawn.weights) if return_dict else (images, info)

    def save_pretrained(self, save_directory: str | Path, *_: Any, **__: Any) -> None:
        """A folder that `from_pretrained` reads again: without a lock, for it is no longer what somebody signed.

        Where this class comes from a folder the folder's code goes with it; where it comes from the package paris_swarm
        the copy needs paris_swarm too.
        """
        folder = Path(save_directory)
        super().save_pretrained(folder)
        if __name__.startswith("paris_swarm."):
            return
        (folder / f"{__name__.split('.')[-1]}.py").write_bytes(SOURCE)
        index = json.loads((folder / self.config_name).read_bytes())
        index["_class_name"] = [__name__.split(".")[-1], type(self).__name__]
        for name in ("experts", "router"):
            if index[name][0] is not None:
                index[name][0] = index[name][0].split(".")[-1]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states float32 [P, L, D], zero behind each prompt's own length, and the lengths int64 [P].

        Rounded to float16 on the way, as training data are stored. Raises ValueError without a text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this folder holds no text encoder: pass text_encoder= and tokenizer= to from_pretrained, or prompts "
                "that are encoded already as prompt_embeds"
            )
        tokens = self.experts.model_config.text_tokens
        whole = bool((self.experts.config.about or {}).get("pad_text", False))
        ids = self.tokenizer(
            list(prompts),
            padding="max_length" if whole else "longest",
            truncation=True,
            max_length=tokens if whole else self.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self._execution_device)
        mask = torch.ones_like(ids["input_ids"]) if whole else ids["attention_mask"]  # [P, L]
        with torch.inference_mode():
            # Where padding counts the encoder never saw a mask either (CLIP, as in Stable Diffusion).
            seen = None if whole else ids["attention_mask"]
            hidden = self.text_encoder(ids["input_ids"], attention_mask=seen).last_hidden_state
            states = (hidden.float() * mask[..., None]).half().float()  # [P, L, D]
        return states.cpu(), mask.sum(dim=1).cpu()

    def _captions(
        self, prompt: str | Sequence[str] | None, embeds: Tensor | None, lengths: Sequence[int] | Tensor | None
    ) -> tuple[Tensor, Tensor, list[str]]:
        if (prompt is None) == (embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if embeds is not None:
            wanted = self.experts.model_config.text_dim
            if embeds.ndim != 3 or embeds.shape[2] != wanted:
                raise ValueError(f"prompt_embeds must be [P, L, {wanted}], got {list(embeds.shape)}")
            counts = torch.full((len(embeds),), embeds.shape[1]) if lengths is None else torch.as_tensor(lengths)
            return embeds.float().cpu(), counts.to(torch.int64).cpu(), [""] * len(embeds)
        words = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not words or any(not isinstance(text, str) or not text.strip() for text in words):
            raise ValueError("prompt is empty: say what to draw")
        return *self.encode_prompt(words), words

    def _null_text(self, negative_prompt: str | None) -> NullText:
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise ValueError("negative_prompt is one text for all pictures")
        null = self.experts.null_caption
        if negative_prompt or null is None:
            states, lengths = self.encode_prompt([negative_prompt or ""])
            return NullText(states[0], int(lengths[0]))
        return NullText(null, len(null))

    def _network(self, k: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        return functools.partial(self.experts, k)

    def _decoder(self, output_type: str) -> Callable[[Tensor], Tensor]:
        """From what was sampled [b, C, H, W] to uint8 [b, H, W, 3], or to itself for "latent"."""
        if output_type == "latent":
            return torch.Tensor.float
        return from_pixels if self.vae is None else vae_decoder(self.vae)


def by_scheduler(scheduler: Any) -> Sampler:
    """A scheduler of diffusers as a sampler.

    Raises (when it samples):
        ValueError: it asks for more or fewer velocities than one a step.
    """

    def solve(
        velocity: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        steps: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=times(steps)[:-1].tolist(), device=noise.device)
        else:
            scheduler.set_timesteps(steps, device=noise.device)
        if len(scheduler.timesteps) != steps:
            raise ValueError(
                f"{type(scheduler).__name__} takes {len(scheduler.timesteps)} velocities for {steps} steps: choose "
                f"sampler= among {', '.join(SAMPLERS)} instead"
            )
        x = noise
        for step, timestep in enumerate(scheduler.timesteps):
            t = torch.full((x.shape[0],), float(scheduler.sigmas[step]), dtype=x.dtype, device=x.device)  # [B]
            x = scheduler.step(velocity(x, t), timestep, x, return_dict=False)[0]  # [B, ...]
            if on_step is not None:
                on_step(step + 1, steps)
        return x

    return solve


def finished(images: NDArray[Any], output_type: str, info: Sequence[dict[str, str]]) -> Any:
    """Drawn pictures, uint8 [N, H, W, C] or latents, as the output type says."""
    if output_type == "latent":
        return torch.from_numpy(images)
    if output_type == "np":
        return images.astype(np.float32) / 255
    if output_type == "pt":
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pictures = []
    for image, text in zip(images, info, strict=True):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        picture.__class__ = Picture  # a plain image but for `save`
        picture.info.update(text)
        pictures.append(picture)
    return pictures
