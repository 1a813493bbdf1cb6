"""The assembled folder: sign, change anything, and it must be refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from router_world import ASSEMBLER, PEERS, PIXELS, K, make_world, prompts
from safetensors.torch import load_file, save_file

from paris_swarm.cli.distilling import load_teachers
from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.dht_schemas.errors import BadHeader, BadSignature, DigestMismatch, NotAdmitted, RecordError, WrongPlan
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.router.card import model_card
from paris_swarm.router.ensemble import MissingExperts
from paris_swarm.router.folder import open_folder
from paris_swarm.router.folder_errors import (
    ChangedFile,
    ExtraFile,
    FolderDamaged,
    FolderError,
    LockDisagrees,
    LockRefused,
    MissingFile,
    NotAssembled,
    NotPlainFile,
    OtherPlan,
    RecordRefused,
)
from paris_swarm.router.folder_writing import SlotSource, write_folder
from paris_swarm.router.layout import announcement_path, config_path, manifest_path, weights_path
from paris_swarm.router.lock import LockedFile, open_lock, seal_lock
from paris_swarm.router.verify import verify_folder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def assemble(world, target, sources=None, **changes):
    values = {"identity": ASSEMBLER, "plan": world.plan, "plan_folder": world.plan_folder, "created": 5_000}
    return write_folder(target, slots=sources or world.all_sources(), **{**values, **changes})


@pytest.fixture(scope="module")
def pristine(world, tmp_path_factory):
    target = tmp_path_factory.mktemp("pristine") / "model"
    assemble(world, target, figures={"cluster accuracy": "0.93 of 0.97 real"})
    return target


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def relock(folder: Path, identity: Identity = ASSEMBLER, **changes) -> None:
    """What a dishonest assembler does: signs the folder as it lies."""
    lock = open_lock((folder / "lock.json").read_bytes()).lock
    files = tuple(
        LockedFile(path=path.relative_to(folder).as_posix(), length=path.stat().st_size, blake3=digest_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock.json"
    )
    files = tuple(sorted(files, key=lambda file: file.path))
    changed = lock.model_copy(update={"files": files, "assembler": identity.peer_id, **changes})
    (folder / "lock.json").write_bytes(seal_lock(identity, changed))


# ---------------------------------------------------------------------------------------------------------------------
# the honest folder
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_verifies_and_says_who_made_it(world, pristine):
    told = []
    verified = verify_folder(pristine, plan_id=world.plan.plan_id, on_progress=lambda *now: told.append(now))
    lock = verified.lock
    assert (lock.plan, lock.organiser) == (world.plan.plan_id, world.plan.plan.organiser)
    assert lock.assembler == ASSEMBLER.peer_id
    assert [slot.slot for slot in lock.slots] == ["0", "1", "2", "router"]
    assert [slot.author for slot in lock.slots] == [PEERS[slot].peer_id for slot in ("0", "1", "2", "router")]
    assert lock.missing == ()
    assert verified.digest == digest_file(pristine / "lock.json")
    assert told[-1][0] == told[-1][1] == sum(file.length for file in lock.files)
    assert {file.path for file in lock.files} | {"lock.json"} == {
        path.relative_to(pristine).as_posix() for path in pristine.rglob("*") if path.is_file()
    }


def test_weights_are_the_announced_file_byte_for_byte(world, pristine):
    for slot, checkpoint in world.checkpoints.items():
        assert (pristine / weights_path(slot)).read_bytes() == (checkpoint / "ema.safetensors").read_bytes()


def test_the_card_names_peers_plan_and_figures(world, pristine):
    card = (pristine / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:")
    for said in (
        world.plan.plan_id,
        world.plan.plan.organiser,
        ASSEMBLER.peer_id,
        "0.93 of 0.97 real",
        "three colours",
        'library_name: "diffusers"\n',
        'license: "cc0-1.0"\n',
        "DiffusionPipeline.from_pretrained(",
    ):
        assert said in card
    assert all(identity.peer_id in card for identity in PEERS.values())


def test_a_plan_with_several_clusters_is_no_students(world):
    """Anybody may write `data.distilled` into a plan: an ensemble's card goes on saying what was verified."""
    said = {"plan": "0" * 64, "assembly": "1" * 64, "teachers": {"0": "2" * 64}, "rows": {"drawn": True, "count": 9}}

    def card(clusters: int) -> str:
        data = {**world.plan.plan.data, "distilled": said}
        plan = world.plan.plan.model_copy(update={"data": data, "clusters": clusters})
        return model_card(replace(world.plan, plan=plan), [], (), assembler=ASSEMBLER.peer_id, figures={})

    assert "One dense diffusion model" not in card(K) and "An ensemble of diffusion experts" in card(K)
    assert "One dense diffusion model" in card(1) and "2" * 64 in card(1)
    assert "by the word of its organiser" in card(1)


def test_a_teacher_that_was_changed_since_is_not_listened_to(folder):
    verified = verify_folder(folder)
    teacher = load_teachers(verified, "cpu", 0)
    teacher(0)
    tensors = load_file(folder / weights_path("1"))
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / weights_path("1"))
    with pytest.raises(ChangedFile):
        teacher(1)


def test_the_same_sources_give_the_same_folder(world, pristine, tmp_path):
    again = assemble(world, tmp_path / "again", figures={"cluster accuracy": "0.93 of 0.97 real"})
    assert again.digest == verify_folder(pristine).digest


def test_sampling_does_not_depend_on_the_batch_or_on_how_many_are_drawn(pristine):
    model = open_folder(pristine)
    states, lengths = prompts(4)
    whole = model.sample(states, lengths, n=2, steps=4, guidance=2.0, seed=7, strategy="top-2", batch=64)
    assert whole.images.shape == (8, PIXELS, PIXELS, 3)
    assert whole.images.dtype == np.uint8
    assert whole.weights.shape == (8, 4, K)
    np.testing.assert_allclose(whole.shares.sum(1), 1, rtol=1e-5)
    assert not whole.redirected.any()
    for batch in (1, 3):
        other = model.sample(states, lengths, n=2, steps=4, guidance=2.0, seed=7, strategy="top-2", batch=batch)
        assert np.abs(other.images.astype(int) - whole.images).max() <= 1
        np.testing.assert_allclose(other.weights, whole.weights, atol=1e-5)
    fewer = model.sample(states[:2], lengths[:2], n=2, steps=4, guidance=2.0, seed=7, strategy="top-2")
    assert np.abs(fewer.images.astype(int) - whole.images[:4]).max() <= 1
    other_seed = model.sample(states[:2], lengths[:2], n=2, steps=4, guidance=2.0, seed=8, strategy="top-2")
    assert (other_seed.images != fewer.images).any(axis=(1, 2, 3)).all()
    assert len({image.tobytes() for image in whole.images}) == 8


def test_sampling_reports_each_step(pristine):
    told = []
    open_folder(pristine).sample(*prompts(3), steps=2, batch=2, on_step=told.append)
    assert [(step.batch, step.batches, step.step, step.steps) for step in told] == [
        (1, 2, 1, 2),
        (1, 2, 2, 2),
        (2, 2, 1, 2),
        (2, 2, 2, 2),
    ]


def test_wrong_prompts_are_refused(pristine):
    model = open_folder(pristine)
    states, lengths = prompts(2)
    for bad in (
        lambda: model.sample(states[..., :4], lengths),
        lambda: model.sample(states, lengths[:1]),
        lambda: model.sample(states[:0], lengths[:0]),
        lambda: model.sample(states, lengths, n=0),
        lambda: model.sample(states, lengths, batch=0),
        lambda: model.sample(states, lengths, steps=0),
        lambda: model.sample(states, lengths, strategy="top-9"),
    ):
        with pytest.raises(ValueError):
            bad()


# ---------------------------------------------------------------------------------------------------------------------
# tampering after the lock
# ---------------------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_one_changed_byte_anywhere_is_refused_and_named(folder):
    """R-DIR-2, R-DIR-6"""
    for path in files_of(folder):
        data = (folder / path).read_bytes()
        for position in (0, len(data) // 2, len(data) - 1):
            (folder / path).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            with pytest.raises(LockRefused if path == "lock.json" else ChangedFile) as caught:
                verify_folder(folder)
            assert caught.value.where == path
            assert path in str(caught.value)
        for data_now in (data[:-1], data + b"\0"):
            (folder / path).write_bytes(data_now)
            with pytest.raises(FolderError, match="lock.json" if path == "lock.json" else "bytes"):
                verify_folder(folder)
        (folder / path).write_bytes(data)
    verify_folder(folder)


def test_each_missing_file_is_named(folder):
    """R-DIR-1, R-DIR-3"""
    for path in files_of(folder):
        data = (folder / path).read_bytes()
        (folder / path).unlink()
        with pytest.raises(NotAssembled if path == "lock.json" else MissingFile, match=path):
            open_folder(folder)
        (folder / path).write_bytes(data)


@pytest.mark.parametrize(
    "name", ["modeling.py", "experts/expert_0/model.bin", "plan/x", "new/empty/", ".hidden", "bad\nname"]
)
def test_anything_extra_is_named(folder, name):
    """R-DIR-4"""
    if name.endswith("/"):
        (folder / name).mkdir(parents=True)
    else:
        (folder / name).write_bytes(b"")
    with pytest.raises(FolderError) as caught:
        verify_folder(folder)
    problems = getattr(caught.value, "problems", None) or (caught.value,)
    assert all(isinstance(problem, ExtraFile) for problem in problems)
    assert name.split("/")[0].replace("\n", "\\n") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_are_refused_even_to_the_same_bytes(folder, tmp_path):
    """R-DIR-5"""
    target = folder / weights_path("1")
    aside = tmp_path / "aside.safetensors"
    target.rename(aside)
    target.symlink_to(aside)
    with pytest.raises(NotPlainFile) as caught:
        verify_folder(folder)
    assert caught.value.where == weights_path("1")
    target.unlink()
    aside.rename(target)
    verify_folder(folder)

    (folder / "experts").rename(tmp_path / "experts")
    (folder / "experts").symlink_to(tmp_path / "experts")
    with pytest.raises(FolderDamaged, match="NotPlainFile experts"):
        verify_folder(folder)

    (folder / "experts").unlink()
    (tmp_path / "experts").rename(folder / "experts")
    os.mkfifo(folder / "pipe")
    with pytest.raises(NotPlainFile, match="pipe"):
        verify_folder(folder)


def test_several_problems_are_all_named(folder):
    """R-DIR-7"""
    (folder / "README.md").write_text("better")
    (folder / weights_path("2")).unlink()
    (folder / "extra").write_text("")
    with pytest.raises(FolderDamaged) as caught:
        verify_folder(folder)
    assert {(type(p), p.where) for p in caught.value.problems} == {
        (ChangedFile, "README.md"),
        (MissingFile, weights_path("2")),
        (ExtraFile, "extra"),
    }


def test_an_unlocked_folder_is_refused_as_a_whole_however_deep_it_goes(folder, monkeypatch):
    """Whoever sends a folder can nest more folders in it than a walk has stack for."""
    (folder / "__pycache__").mkdir()
    monkeypatch.chdir(folder / "__pycache__")
    for _ in range(1_500):
        os.mkdir("d")
        os.chdir("d")
    try:
        with pytest.raises(ExtraFile, match="__pycache__: a folder"):
            verify_folder(folder)
    finally:  # deeper than shutil.rmtree can clear up
        for _ in range(1_500):
            os.chdir("..")
            os.rmdir("d")


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(NotAssembled, match=r"has no lock\.json"):
        verify_folder(tmp_path)
    with pytest.raises(NotAssembled, match="is not there"):
        verify_folder(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(NotAssembled, match="nobody signed"):
        verify_folder(tmp_path)
    (tmp_path / "lock.json").symlink_to("/dev/zero")
    with pytest.raises(NotPlainFile):
        verify_folder(tmp_path)


def test_weights_changed_between_verification_and_loading_are_not_used(folder):
    model = open_folder(folder)
    states, lengths = prompts(12)
    for slot in ("0", "1", "2"):
        path = folder / weights_path(slot)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(ChangedFile):
        model.sample(states, lengths, steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# dishonest assemblers: the lock is theirs, the records are not
# ---------------------------------------------------------------------------------------------------------------------


def test_a_lock_by_another_key_is_another_assembly(folder, pristine):
    other = Identity(b"x" * 32)
    relock(folder, other)
    verified = verify_folder(folder)
    assert verified.lock.assembler == other.peer_id
    assert verified.digest != verify_folder(pristine).digest


def test_the_plan_can_be_pinned(folder):
    """R-DIR-8"""
    with pytest.raises(OtherPlan):
        verify_folder(folder, plan_id="0" * 64)


def test_swapped_weights_are_refused(folder):
    tensors = load_file(folder / weights_path("0"))
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, folder / weights_path("0"))
    relock(folder)
    with pytest.raises(RecordRefused) as caught:
        verify_folder(folder)
    assert caught.value.where == weights_path("0")
    assert isinstance(caught.value.__cause__, DigestMismatch)


def test_another_slots_weights_are_refused(folder):
    shutil.copy(folder / weights_path("0"), folder / weights_path("1"))
    relock(folder)
    with pytest.raises(RecordRefused) as caught:
        verify_folder(folder)
    assert caught.value.where == weights_path("1")


def test_a_forged_announcement_is_refused(folder):
    """R-DIR-9"""
    path = folder / announcement_path("0")
    value = json.loads(path.read_bytes())
    value["signatures"][0]["sig"] = json.loads((folder / announcement_path("1")).read_bytes())["signatures"][0]["sig"]
    path.write_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    relock(folder)
    with pytest.raises(RecordRefused) as caught:
        verify_folder(folder)
    assert isinstance(caught.value.__cause__, BadSignature)
    assert caught.value.where == announcement_path("0")


def test_an_announcement_of_another_plan_is_refused(world, folder):
    source = world.announce("0", world.checkpoints["0"], plan="f" * 64)
    (folder / announcement_path("0")).write_bytes(source.announcement)
    relock(folder)
    with pytest.raises(RecordRefused) as caught:
        verify_folder(folder)
    assert isinstance(caught.value.__cause__, WrongPlan)


def test_an_announcement_of_another_slot_is_refused(folder):
    shutil.copy(folder / announcement_path("1"), folder / announcement_path("0"))
    relock(folder)
    with pytest.raises(LockDisagrees, match="slot 0"):
        verify_folder(folder)


@pytest.mark.parametrize(
    "change", [{"step": 3}, {"probe_loss": 0.1}, {"root": "0" * 64}, {"author": ASSEMBLER.peer_id}]
)
def test_a_lock_that_says_other_than_the_author_is_refused(folder, change):
    """R-DIR-10"""
    lock = open_lock((folder / "lock.json").read_bytes()).lock
    slots = (lock.slots[0].model_copy(update=change), *lock.slots[1:])
    relock(folder, slots=slots)
    with pytest.raises((LockDisagrees, ExtraFile)):
        verify_folder(folder)


def test_slots_left_out_of_the_lock_are_refused(folder):
    lock = open_lock((folder / "lock.json").read_bytes()).lock
    relock(folder, slots=lock.slots[1:])
    with pytest.raises(LockDisagrees, match="slot 0"):
        verify_folder(folder)
    relock(folder, slots=lock.slots[1:], missing=("0",))
    with pytest.raises(ExtraFile):
        verify_folder(folder)


def test_files_without_a_place_are_refused_though_locked(folder):
    (folder / "modeling.py").write_text("print('hello')")
    relock(folder)
    with pytest.raises(ExtraFile, match=r"modeling\.py"):
        verify_folder(folder)


def test_needed_files_left_out_are_refused(folder):
    for path in ("plan/probe.safetensors", config_path("router"), "README.md"):
        data = (folder / path).read_bytes()
        (folder / path).unlink()
        relock(folder)
        with pytest.raises(LockDisagrees, match=path):
            verify_folder(folder)
        (folder / path).write_bytes(data)


def test_a_changed_plan_file_is_refused(folder):
    (folder / "plan/centroids.npy").write_bytes(b"other centroids")
    relock(folder)
    with pytest.raises(RecordRefused, match=r"centroids\.npy"):
        verify_folder(folder)


def test_a_config_that_lies_about_its_network_is_refused(folder):
    path = folder / config_path("0")
    config = json.loads(path.read_bytes())
    config["recipe"]["model"]["patch"] = 2
    path.write_text(json.dumps(config))
    relock(folder)
    with pytest.raises(LockDisagrees, match="recipe"):
        verify_folder(folder)


def test_a_holding_of_another_announcement_is_refused(folder):
    path = folder / "records/holding-0.json"
    path.write_bytes((folder / "records/holding-1.json").read_bytes())
    relock(folder)
    with pytest.raises(RecordRefused, match="holding-0"):
        verify_folder(folder)


# ---------------------------------------------------------------------------------------------------------------------
# dishonest authors: refused while the folder is written
# ---------------------------------------------------------------------------------------------------------------------


def crafted(world, tmp_path, name, tensors):
    """A checkpoint folder of slot 0 with other EMA tensors, properly announced by its author."""
    checkpoint = Path(shutil.copytree(world.checkpoints["0"], tmp_path / name))
    save_file(tensors, checkpoint / "ema.safetensors")
    return world.announce("0", checkpoint)


def test_weights_of_another_shape_are_never_written(world, tmp_path):
    tensors = load_file(world.checkpoints["0"] / "ema.safetensors")
    tensors["pos_embed"] = tensors["pos_embed"][:, :2].contiguous()
    source = crafted(world, tmp_path, "shape", tensors)
    with pytest.raises(RecordRefused) as caught:
        assemble(world, tmp_path / "model", [source])
    assert isinstance(caught.value.__cause__, BadHeader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shape"]


def test_infinite_weights_are_not_sampled(world, tmp_path):
    tensors = load_file(world.checkpoints["0"] / "ema.safetensors")
    tensors["pos_embed"] = torch.full_like(tensors["pos_embed"], torch.nan)
    sources = [crafted(world, tmp_path, "nan", tensors), world.sources["router"]]
    assemble(world, tmp_path / "model", sources)
    with pytest.raises(RecordRefused, match="NaN"):
        open_folder(tmp_path / "model", allow_missing=True).sample(*prompts(1), steps=1)


def test_a_checkpoint_below_the_bar_is_refused(world, tmp_path):
    with pytest.raises(RecordRefused, match="the bar is"):
        assemble(world, tmp_path / "model", [world.announce("0", world.checkpoints["0"], probe_loss=1.5)])


def test_a_manifest_that_is_not_the_announced_one_is_refused(world, tmp_path):
    source = replace(world.sources["0"], manifest=world.sources["1"].manifest)
    with pytest.raises(RecordRefused, match="manifests/"):
        assemble(world, tmp_path / "model", [source])
    assert list(tmp_path.iterdir()) == []


def test_an_author_without_a_token_is_refused_by_a_plan_for_invited_peers(tmp_path):
    invited = make_world(tmp_path / "invited", admission="invited")
    with pytest.raises(RecordRefused) as caught:
        assemble(invited, tmp_path / "model")
    assert isinstance(caught.value.__cause__, NotAdmitted)


def test_a_slot_given_twice_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="twice"):
        assemble(world, tmp_path / "model", [world.sources["0"], world.sources["0"]])


def test_a_slot_the_plan_does_not_have_is_refused(world, tmp_path):
    announcement = Announcement.open(world.sources["0"].announcement).record.model_copy(update={"slot": "7"})
    source = SlotSource(announcement.seal(PEERS["0"]), world.sources["0"].manifest, world.sources["0"].weights)
    with pytest.raises(RecordError, match="slot 7"):
        assemble(world, tmp_path / "model", [source])


# ---------------------------------------------------------------------------------------------------------------------
# incomplete swarms, writing
# ---------------------------------------------------------------------------------------------------------------------


def test_missing_experts_are_named_refused_or_reported(world, tmp_path):
    verified = assemble(world, tmp_path / "model", [world.sources["1"], world.sources["router"]])
    assert verified.lock.missing == ("0", "2")
    assert "Missing: expert 0, expert 2." in (tmp_path / "model/README.md").read_text()
    with pytest.raises(MissingExperts) as caught:
        open_folder(tmp_path / "model")
    assert caught.value.missing == ("0", "2")
    pictures = open_folder(tmp_path / "model", allow_missing=True).sample(*prompts(3), steps=2)
    assert (pictures.shares[:, 1] == 1).all()
    assert (pictures.redirected > 0.2).all()


def test_experts_without_a_router_are_not_sampled(world, tmp_path):
    assemble(world, tmp_path / "model", [world.sources[slot] for slot in ("0", "1", "2")])
    with pytest.raises(MissingExperts, match="the router"):
        open_folder(tmp_path / "model", allow_missing=True)


def test_only_asked_for_plan_files_come_along(world, tmp_path):
    assemble(world, tmp_path / "model", plan_files=[])
    assert [path.name for path in (tmp_path / "model/plan").iterdir()] == ["probe.safetensors"]
    with pytest.raises(ValueError, match="strange"):
        assemble(world, tmp_path / "other", plan_files=["strange"])


def test_what_is_already_there_is_never_lost(world, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    assemble(world, target)  # an empty folder is fine
    with pytest.raises(ValueError, match="replace"):
        assemble(world, target)
    before = verify_folder(target).digest
    with pytest.raises(ValueError, match="no file"):
        assemble(world, target, replace=True, plan_files=["nothing"])
    broken = replace(world.sources["0"], weights=tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError):
        assemble(world, target, [broken], replace=True)
    assert verify_folder(target).digest == before
    assert assemble(world, target, replace=True, created=6_000).digest != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="other things"):
        assemble(world, tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_the_manifest_of_each_root_lies_under_its_name(world, pristine):
    for source in world.all_sources():
        root = Announcement.open(source.announcement).record.root
        assert (pristine / manifest_path(root)).read_bytes() == source.manifest


# ---------------------------------------------------------------------------------------------------------------------
# what must not be needed
# ---------------------------------------------------------------------------------------------------------------------


def test_verify_needs_no_torch_and_neither_needs_hivemind(pristine):
    code = f"""
    import importlib.abc, sys

    class Block(importlib.abc.MetaPathFinder):
        blocked = {{"torch", "hivemind", "paris_swarm.swarm"}}
        def find_spec(self, name, path=None, target=None):
            if name in self.blocked or name.split(".")[0] in self.blocked:
                raise ImportError(f"{{name}} is blocked")

    block = Block()
    sys.meta_path.insert(0, block)
    from paris_swarm.router.verify import verify_folder
    verified = verify_folder({str(pristine)!r})
    block.blocked = {{"hivemind", "paris_swarm.swarm"}}
    import numpy, torch
    from paris_swarm.router.folder import open_folder
    model = open_folder({str(pristine)!r})
    pictures = model.sample(numpy.zeros((1, 5, 8), "float16"), [2], steps=1)
    assert not any(name.startswith("hivemind") for name in sys.modules)
    print(pictures.images.shape, verified.digest == model.digest)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"(1, {PIXELS}, {PIXELS}, 3) True"


def test_errors_keep_path_and_rule_across_a_process_boundary():
    import copy

    error = ChangedFile("other bytes than were locked", where="README.md")
    again = copy.copy(error)
    assert (type(again), again.where, again.rule, str(again)) == (ChangedFile, "README.md", error.rule, str(error))
    assert str(error).endswith("[R-DIR-6: README.md: other bytes than were locked]")
