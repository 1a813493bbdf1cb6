"""The assembled folder, read: opened only after verification, sampled from what was verified."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.dht_schemas.plan import PLAN_FILE
from paris_swarm.expert.flow import from_pixels
from paris_swarm.expert.recipe import Recipe
from paris_swarm.expert.task import build_expert
from paris_swarm.router.draw import DrawStep, Pictures, draw, vae_decoder
from paris_swarm.router.ensemble import Ensemble, NullText
from paris_swarm.router.folder_errors import RecordRefused
from paris_swarm.router.layout import (
    PROBE_FILE,
    VAE_WEIGHTS,
    needed_slots,
    plan_file_path,
    weights_path,
)
from paris_swarm.router.recipe import RouterRecipe
from paris_swarm.router.task import build_router
from paris_swarm.router.verify import VerifiedFolder, verify_folder
from paris_swarm.router.weights import Skeleton, StableShapes, TensorsDiffer, check_precision, hold, tensors_in_place


def open_folder(
    folder: str | os.PathLike[str],
    *,
    plan_id: str | None = None,
    device: str | torch.device = "cpu",
    allow_missing: bool = False,
    memory_budget: int | None = None,
    vae: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    compiled: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Assembled:
    """Verifies an assembled folder, then makes it ready to sample. No expert is loaded before a picture needs it.

    allow_missing: whether to sample although experts are missing (never without the router, where there are several
    clusters). memory_budget: bytes of expert weights kept in memory, None for all. vae: a folder or hub name of the
    plan's VAE, for a folder of latent experts that holds none. precision: how the experts' weights are held
    (`weights.PRECISIONS`). compiled: whether networks go through torch.compile. on_progress as in `verify_folder`.

    Raises:
        FolderError: the folder does not verify, or its plan's recipe cannot be read by this version.
        MissingExperts: experts or the router are missing.
        OSError: a file could not be read.
    """
    return Assembled(
        verify_folder(folder, plan_id=plan_id, on_progress=on_progress),
        device=device,
        allow_missing=allow_missing,
        memory_budget=memory_budget,
        vae=vae,
        precision=precision,
        compiled=compiled,
    )


class Assembled:
    """A verified folder as a model. Weights are compared with the lock again in the moment they are loaded."""

    def __init__(
        self,
        verified: VerifiedFolder,
        *,
        device: str | torch.device,
        allow_missing: bool,
        memory_budget: int | None = None,
        vae: str | os.PathLike[str] | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        check_precision(precision)
        self._precision, self._compiled = precision, compiled
        self._skeletons: dict[Recipe | RouterRecipe, Skeleton] = {}
        self._finite: set[str] = set()
        self.verified = verified
        self._vae = vae
        self.device = torch.device(device)
        plan = verified.plan.plan
        try:
            self.recipes = {k: Recipe.from_dict(plan.slot_spec(str(k)).recipe) for k in range(plan.clusters)}
            router_recipe = RouterRecipe.from_dict(plan.router.recipe)
        except (TypeError, ValueError) as error:
            raise RecordRefused(f"a recipe this version cannot read: {error}", where=PLAN_FILE) from error
        shapes = {each.model.data_shape for each in self.recipes.values()}
        if len(shapes) != 1:
            raise RecordRefused("its experts disagree about the shape of pictures or captions", where=PLAN_FILE)
        here = [slot.slot for slot in verified.lock.slots]
        experts = {int(slot): self._expert_loader(slot) for slot in here if slot != ROUTER}
        router = self._load(ROUTER, router_recipe, lambda: build_router(router_recipe)) if ROUTER in here else None
        self.ensemble = Ensemble(
            plan.clusters,
            experts,
            router,
            self._null_text(),
            allow_missing=allow_missing,
            memory_budget=memory_budget,
        )

    @property
    def plan_id(self) -> str:
        """The plan's id."""
        return self.verified.plan.plan_id

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first expert; what all share of it is the shape of pictures and captions."""
        return self.recipes[0]

    @property
    def digest(self) -> str:
        """The assembly digest."""
        return self.verified.digest

    @property
    def missing(self) -> tuple[str, ...]:
        """Slots of the plan without a checkpoint here; a plan with one cluster has no use for a router."""
        return needed_slots(self.verified.plan, self.verified.lock.missing)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the experts draw: pixels, or latents."""
        model = self.recipe.model
        return model.channels, model.resolution, model.resolution

    def sample(
        self,
        states: Tensor | NDArray[np.float16],
        lengths: Tensor | NDArray[np.int16] | Sequence[int],
        *,
        n: int = 1,
        strategy: str = "top-1",
        sampler: str = "euler",
        steps: int = 50,
        guidance: float = 2.5,
        seed: int = 0,
        batch: int = 32,
        labels: Sequence[int] | None = None,
        on_step: Callable[[DrawStep], None] | None = None,
    ) -> Pictures:
        """`n` pictures for each prompt, encoded as states float16 [P, L, D] and lengths [P] by the plan's text encoder.

        Images come as uint8 [P * n, H, W, C], prompt by prompt, with each expert's weight at every step. Picture i
        depends on (seed, i) and its prompt only.

        Raises:
            ValueError: the prompts' shape, n, batch, steps, strategy, sampler or labels.
            FolderError: weights were changed since the folder was verified, or are not those of the recipe.
            EncoderError: the experts draw latents, and the plan's VAE is not at hand.
        """
        width = int(np.asarray(states.shape)[-1])
        if width != self.recipe.model.text_dim:
            raise ValueError(
                f"the prompts have states of {width} numbers a token, this model's encoder gives "
                f"{self.recipe.model.text_dim}: encode them with the plan's text encoder"
            )
        return draw(
            self.ensemble,
            states,
            lengths,
            shape=self.shape,
            n=n,
            strategy=strategy,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch=batch,
            labels=labels,
            device=self.device,
            on_step=on_step,
            decode=self._decode,
        )

    @functools.cached_property
    def _decode(self) -> Callable[[Tensor], Tensor]:
        """From what the experts draw to pictures uint8 [b, H, W, C]. The VAE is compared with the plan when loaded."""
        if self.verified.plan.plan.data.get("latents") is None:
            return from_pixels
        from paris_swarm.router.encoder_files import plan_vae

        place = self._vae
        if place is None and any(file.path == VAE_WEIGHTS for file in self.verified.lock.files):
            place = self.verified.path / "vae"
        vae = plan_vae(self.verified.plan, None if place is None else os.fspath(place), device=str(self.device))
        return vae_decoder(vae.model)

    def _expert_loader(self, slot: str) -> Callable[[], nn.Module]:
        recipe = self.recipes[int(slot)]
        return lambda: self._load(slot, recipe, lambda: build_expert(recipe))

    def _load(self, slot: str, recipe: Recipe | RouterRecipe, build: Callable[[], nn.Module]) -> nn.Module:
        where = weights_path(slot)
        tensors = self._tensors(where)
        skeleton = self._skeletons.get(recipe)
        if skeleton is None:
            skeleton = self._skeletons[recipe] = Skeleton(build)
        try:
            network = skeleton.filled(tensors)
        except TensorsDiffer as error:
            raise RecordRefused(str(error), where=where) from error
        if where not in self._finite:  # the same bytes, by digest, whenever they are loaded again
            broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
            if broken:
                raise RecordRefused(f"tensor {broken[0]} holds a NaN or an infinity", where=where)
            self._finite.add(where)
        held = hold(network.to(self.device), self._precision if slot != ROUTER else "fp32")
        return StableShapes(held) if self._compiled else held

    def _null_text(self) -> NullText:
        where = plan_file_path(PROBE_FILE)
        tensors = self._tensors(where)
        states, length = tensors.get("null_states"), tensors.get("null_length")
        text = self.recipe.model
        if (
            states is None
            or length is None
            or states.ndim != 2
            or states.shape[1] != text.text_dim
            or not states.is_floating_point()
            or not bool(states.isfinite().all())
            or length.numel() != 1
            or length.dtype not in (torch.int16, torch.int32, torch.int64)
            or not 0 <= int(length) <= states.shape[0]
        ):
            raise RecordRefused("holds no null caption of the plan's text encoder", where=where)
        return NullText(states.float(), int(length))

    def _tensors(self, where: str) -> dict[str, Any]:
        # From the very bytes that were compared with the lock: another process may write to the file meanwhile.
        try:
            return tensors_in_place(self.verified.read(where))
        except SafetensorError as error:
            raise RecordRefused(f"no readable safetensors file: {error}", where=where) from error
