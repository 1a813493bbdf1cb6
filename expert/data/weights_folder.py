"""Published weights: the folder that a path or a hub name means, and a digest of what was loaded from it.

The digest is of the numbers, not of files: it is the same whether a model came from the hub or from a copy, whole or as
part of a larger file, and whatever a release of its library calls the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from paris_swarm.expert.data.asked_network import UNMADE, check_asked

MAX_DOWNLOAD = 8 << 30
"""Bytes of one encoder that are downloaded for its name alone. Paris's largest, CLIP ViT-L/14, has 1.7 GB."""
MAX_BESIDE = 64 << 20
"""Bytes of a vocabulary or a config. CLIP's tokenizer.json has 2 MB, that of a model of all languages some 30."""

INDEX = ".index.json"
"""Behind the name of a weights file: the file that says which of several holds each tensor."""
MAX_SHARDS = 256
"""Files over which the weights of one encoder may be spread; those of language models of 100 GB have 30."""

_PLAIN_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\.safetensors")
"""A file beside its index, and no pattern of names: what the hub is asked for, and what the libraries open."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class EncoderError(ValueError):
    """An encoder is not installed, cannot be found or read, or is not the one that is asked for."""


def hub_name(place: str | Path) -> str | None:
    """The hub name that ``place`` is, or None when it is a folder here (or neither)."""
    return str(place) if not Path(place).is_dir() and _HUB_NAME.fullmatch(str(place)) else None


def weights_folder(place: str | Path, what: str, files: Iterable[str]) -> Path:
    """The local folder of published weights, downloaded to the Hugging Face cache where ``place`` is a hub name.

    what: for the error, e.g. "a VAE (AutoencoderKL)"; files: names of the files that are needed; no other is asked for
    but, where the weights are spread over several, those that their index (`NAME.safetensors.index.json`) names.

    Raises EncoderError: neither a folder nor a hub name; it is not in the cache and cannot be downloaded, or is larger
    than MAX_DOWNLOAD: a plan names hub models too, and what they weigh is for its author to say.
    """
    name, files = hub_name(place), list(files)
    if name is None:
        if not Path(place).is_dir():
            raise EncoderError(f"{place} is neither a folder here nor a hub name (owner/name): give {what}")
        return _check_beside(Path(place), files)
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HTTPError, RevisionResolutionError
    except ImportError as error:
        raise missing_package() from error
    by_hand = f"`hf download {name} {' '.join(files)} --local-dir {name.split('/')[1]}`"
    try:
        # One commit for the look and the download: what was weighed is what comes.
        commit = HfApi().resolve_revision(name)
        indices = list(_indices(files))
        listed = snapshot_download(name, allow_patterns=[*files, *indices], revision=commit, dry_run=True)
        sizes = {each.filename: each.file_size for each in listed}
        for index in (index for index in indices if index in sizes and _whole(index) not in sizes):
            if (size := sizes[index]) is None or size > MAX_BESIDE:
                said = "a size that the hub does not say" if size is None else f"{size:,} bytes"
                raise EncoderError(f"{name}: {index} has {said}, at most {MAX_BESIDE:,} bytes are read")
            folder = Path(snapshot_download(name, allow_patterns=[index], revision=commit))
            files = [*(file for file in files if file != _whole(index)), index, *_shards(folder / index)]
            by_hand = f"`hf download {name} {' '.join(files)} --local-dir {name.split('/')[1]}`"
            listed = snapshot_download(name, allow_patterns=files, revision=commit, dry_run=True)
        wanted = {each.filename: each.file_size for each in listed if each.will_download and each.filename in files}
        _check_size(name, wanted, by_hand)
        return _check_beside(Path(snapshot_download(name, allow_patterns=files, revision=commit)), files)
    except EncoderError:
        raise
    except (OSError, ValueError, HTTPError, RevisionResolutionError) as error:  # what the hub and the network raise
        cached = None
        with suppress(OSError, ValueError):
            cached = Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
        if cached is not None:
            return _check_beside(cached, files)
        first = str(error).strip().split("\n")[0][:400]
        raise EncoderError(
            f"there is no folder {name} here, and as a hub name it is not in the Hugging Face cache of this machine "
            f"and could not be downloaded ({first}). On a machine with internet run {by_hand}, bring that folder here "
            "and give its path instead of the name"
        ) from error


def _check_size(name: str, sizes: Mapping[str, int | None], by_hand: str) -> None:
    """Raise EncoderError where the files to download, bytes by name, are more than MAX_DOWNLOAD or nobody knows."""
    unknown = sorted(file for file, size in sizes.items() if size is None)
    total = sum(size or 0 for size in sizes.values())
    if not unknown and total <= MAX_DOWNLOAD:
        return
    largest = max(sizes, key=lambda file: sizes[file] or 0)
    how_much = f"the hub does not say how large {unknown[0]} is" if unknown else f"{total / 2**30:.1f} GiB to download"
    raise EncoderError(
        f"{name}: {how_much} (the largest: {largest}), at most {MAX_DOWNLOAD >> 30} GiB are fetched unasked. If you "
        f"trust whoever named it, run {by_hand} and give that folder instead of the name"
    )


def _check_beside(folder: Path, files: Iterable[str]) -> Path:
    """The folder, once what is read whole beside its weights is of a size that can be, and an index names files beside
    it and nothing else.
    """
    files = list(files)
    for name in dict.fromkeys([*files, *_indices(files)]):
        path = folder / name
        if path.suffix != ".safetensors" and path.is_file() and path.stat().st_size > MAX_BESIDE:
            raise EncoderError(f"{path} has {path.stat().st_size:,} bytes, at most {MAX_BESIDE:,} are read")
        if path.name.endswith(INDEX) and path.is_file():
            _shards(path)
    return folder


def _indices(files: Iterable[str]) -> Iterator[str]:
    """What the index of each weights file is called, where it is spread over several."""
    return (name + INDEX for name in files if name.endswith(".safetensors"))


def _whole(index: str) -> str:
    """The weights file that an index stands for."""
    return index.removesuffix(INDEX)


def _shards(index: Path) -> list[str]:
    """The files over which weights are spread, as their index names them.

    Raises EncoderError: it cannot be read, or names none, too many, or anything but files beside it.
    """
    try:
        placed = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(placed.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EncoderError(
            f"{index} is no index of weights ({error!r:.200}): bring the model's folder again"
        ) from error
    odd = [name for name in names if not isinstance(name, str) or not _PLAIN_SHARD.fullmatch(name)]
    if odd or not 0 < len(names) <= MAX_SHARDS:
        why = f"{odd[0]!r:.200}" if odd else f"{len(names)} files"
        raise EncoderError(
            f"{index} names {why}: weights lie in 1 to {MAX_SHARDS} safetensors files beside their index"
        )
    return names


def missing_package() -> EncoderError:
    """What to say where diffusers or transformers is not installed."""
    return EncoderError("published encoders need diffusers and transformers: pip install 'paris-swarm[diffusers]'")


def load_whole(model_class: Any, folder: Path, *, more_is_fine: bool = False, **options: Any) -> Any:
    """A model of diffusers or transformers from safetensors, float32, in eval mode, frozen.

    Their own loaders only warn of a tensor that is missing or has another shape, and leave it random. more_is_fine:
    whether the file may hold other models' tensors too.

    Raises EncoderError: no readable safetensors of this class there, its config asks for more than they hold, a tensor
    is missing, extra or not finite.
    """
    name = model_class.__name__
    try:
        check_asked(model_class, folder)
        with no_bar():
            model, said = model_class.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    except UNMADE as error:
        first = str(error).strip().split("\n")[0][:400]
        raise EncoderError(f"{folder} holds no {name} that can be read from safetensors files ({first})") from error
    odd = [*said["missing_keys"], *(str(each) for each in said.get("mismatched_keys", ()))]
    if not more_is_fine:
        odd += said["unexpected_keys"]
    if odd:
        raise EncoderError(f"{folder} is not a whole {name}: {odd[0]} is missing, extra or of another shape")
    for tensor_name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise EncoderError(f"{folder}: {tensor_name} holds a NaN or an infinity")
    return model.float().eval().requires_grad_(False)


@contextmanager
def no_bar() -> Iterator[None]:
    """transformers draws a progress bar of its own into the middle of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def weights_digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """BLAKE3 in hex over the model's numbers and over what else decides its output.

    Every tensor counts with its dtype, shape and bytes, in the order in which the model has them (its class decides it,
    not a file), so the same numbers in other places are another model; about: plain JSON values.
    """
    whole = blake3(json.dumps(about, sort_keys=True).encode())
    for tensor in tensors.values():
        plain = tensor.detach().cpu().contiguous()
        hasher = blake3(f"{plain.dtype} {list(plain.shape)}\n".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        whole.update(hasher.digest())
    return whole.hexdigest()
