"""`paris-swarm distill DIR -o STUDENT`: one dense model that learns from a folder's experts."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paris_swarm.cli.folder_options import (
    MemoryBudgetOption,
    PlanOption,
    TextEncoderFromOption,
    WrittenTextEncoderOption,
    WrittenVaeOption,
    pinned_plan,
)
from paris_swarm.cli.settings import (
    CompileOption,
    DeviceOption,
    HomeOption,
    JsonOption,
    MicroBatchOption,
    RecomputeOption,
    Settings,
    settings,
)
from paris_swarm.cli.sizes import parse_size

if TYPE_CHECKING:
    from paris_swarm.expert.training import DoneReport, TrainJob


def distill(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder written by `assemble`, with every expert.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the student to write.")] = Path("student"),
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Prepared rows to learn by (default: none are at hand, the experts draw --rows pictures)."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=16, help="Without --data: pictures to draw, all clusters together.")] = 4096,
    draw_steps: Annotated[int, typer.Option(min=1, help="Without --data: Euler steps a picture.")] = 30,
    size: Annotated[
        str | None, typer.Option(help="Named recipe of the student: tiny, S/2, B/2, XL/2 (default: the experts' own).")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the student (default: an expert's)."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="End training after about this long, with the student so far; run again to go on."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures a step (default: a quarter of all experts' together).")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Initial weights: fresh, or the mean of the experts' (default: mean where they are of its kind)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, order of rows, noise and drawn pictures.")] = 0,
    checkpoint_every: Annotated[
        float, typer.Option(min=1, help="Seconds between checkpoints: what a kill may cost.")
    ] = 60,
    memory_budget: MemoryBudgetOption = None,
    micro_batch: MicroBatchOption = 0,
    recompute: RecomputeOption = False,
    compiled: CompileOption = False,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0 leaves torch's choice.")] = 0,
    device: DeviceOption = "auto",
    text_encoder: WrittenTextEncoderOption = True,
    text_encoder_from: TextEncoderFromOption = None,
    vae: WrittenVaeOption = None,
    plan: PlanOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the folder, train one dense model on what its experts say, write it as a folder with one expert.

    For each picture the expert of the picture's own cluster teaches its velocity; no router is asked, and the student
    needs none. Killed or interrupted, the same command goes on, bit for bit, from what lies in .STUDENT.distilling.
    """
    shared = settings(context, home, as_json)
    _flush_denormals(context)
    from paris_swarm.cli.distilling import (
        announce,
        begin_work,
        check_teachers,
        draw_own_rows,
        ending_in_order,
        load_teachers,
        student_rows,
        student_task,
        work_folder,
    )
    from paris_swarm.cli.encoders import folder_encoders
    from paris_swarm.cli.outputs import check_outside
    from paris_swarm.cli.plan_folder import PlanFolder
    from paris_swarm.cli.settings import pick_device
    from paris_swarm.cli.student_plan import STUDENT, student_plan, student_recipe, usual_start
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.training import StepSettings, TrainJob
    from paris_swarm.router.distill import DistillRecipe
    from paris_swarm.router.folder_writing import write_folder
    from paris_swarm.router.verify import verify_folder

    check_outside(out, folder, "-o")
    where = pick_device(device)
    budget = None if memory_budget is None else parse_size(memory_budget, option="--memory-budget")
    verified = verify_folder(folder, plan_id=pinned_plan(plan))
    teacher = PlanFolder(verified.path / "plan", verified.plan)
    own_recipe = student_recipe(verified.plan.plan, size=size, steps=steps, batch=batch, seed=seed)
    begin = start or usual_start(verified.plan.plan, own_recipe)
    recipe = DistillRecipe(own_recipe, check_teachers(verified), begin)
    learned = None if data is None else student_rows(teacher, PreparedData.open(data))
    identity = shared.open_home().identity()
    asked = {
        "peer": identity.peer_id,
        "assembly": verified.digest,
        "size": size or "the experts'",
        "steps": recipe.train.steps,
        "batch": recipe.train.batch,
        "seed": seed,
        "start": begin,
        "student": recipe.digest(),
        "rows": {"drawn": rows, "draw_steps": draw_steps, "seed": seed} if learned is None else learned.digest,
    }
    work = begin_work(out, asked)
    if learned is None:
        _draw(shared, draw_own_rows(verified, work, count=rows, steps=draw_steps, seed=seed, device=where))
        learned = student_rows(teacher, PreparedData.open(work / "rows"))
    with shared.console.status("Preparing the student's plan ..."):
        own = student_plan(
            teacher, work / "plan", identity, recipe, learned, assembly=verified.digest, created=int(time.time())
        )
    text, vae_found, notes = folder_encoders(own.opened, text_encoder_from, vae, with_text=text_encoder)
    for note in notes:
        shared.console.print(note, markup=False, style="yellow")

    until = None if minutes is None else time.monotonic() + minutes * 60
    with ending_in_order() as interrupted:
        done = _train(
            shared,
            TrainJob(
                student_task(teacher, load_teachers(verified, where, budget), recipe, learned),
                work,
                checkpoint_every_s=checkpoint_every,
                threads=threads or None,
                device=where,
                settings=StepSettings(micro_batch, recompute, compiled),
                stop=lambda: interrupted() or (until is not None and time.monotonic() >= until),
            ),
        )
        if interrupted():
            raise KeyboardInterrupt
    source = announce(identity, own, done.folder)
    written = write_folder(
        out,
        identity=identity,
        plan=own.opened,
        plan_folder=own.path,
        slots=[source],
        created=int(time.time()),
        replace=True,  # begin_work has made sure that what lies there is this student, earlier
        text_encoder=text,
        vae=vae_found,
    )
    whole = done.step == done.steps
    if whole:
        shutil.rmtree(work_folder(out))
    slot = next(slot for slot in written.lock.slots if slot.slot == STUDENT)
    bar = own.opened.plan.verification.bars[STUDENT].assemblable
    shared.answer(
        {
            "folder": str(out),
            "plan": own.plan_id,
            "digest": written.digest,
            "root": slot.root,
            "teacher_plan": verified.plan.plan_id,
            "teacher_assembly": verified.digest,
            "teachers": dict(recipe.teachers),
            "rows": {"drawn": learned.drawn, "count": len(learned.rows)},
            "step": done.step,
            "steps": done.steps,
            "done": whole,
            "probe_loss": slot.probe_loss,
            "bar": bar,
        },
        f"Student of {len(recipe.teachers)} experts in {out}: step {done.step} of {done.steps}, probe loss "
        f"{slot.probe_loss:.4f} (bar {bar:.4f})."
        + ("" if whole else "\nRun the same command again to go on.")
        + f"\nNext: paris-swarm sample {out} --prompt '...' -o picture.png",
    )


def _flush_denormals(context: typer.Context) -> None:
    """Subnormal numbers cost a CPU a hundred times a normal one. A thread takes this over from the one that makes it,
    and torch makes its threads with its first large sum: set later, it would hold in some threads of some runs only.
    """
    import torch

    from paris_swarm.expert.provenance import flushes_denormals

    before = flushes_denormals()
    torch.set_flush_denormal(True)
    context.call_on_close(lambda: torch.set_flush_denormal(before))


def _draw(shared: Settings, drawing: Any) -> None:
    """Shows how far the drawing of rows is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drawing rows"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=shared.console, transient=True) as bars:
        task = bars.add_task("drawing", total=None)
        for done in drawing:
            bars.update(task, completed=done.done, total=done.total)


def _train(shared: Settings, job: TrainJob) -> DoneReport:
    """Trains, and shows how far it is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from paris_swarm.cli.exits import Usage
    from paris_swarm.expert.training import (
        DoneReport,
        ResumeReport,
        StepReport,
        TornReport,
        TrainingDiverged,
        train,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    try:
        with Progress(*columns, TimeRemainingColumn(), console=shared.console, transient=True) as bars:
            task = bars.add_task("distilling", total=job.task.recipe.train.steps)
            for report in train(job):
                if isinstance(report, StepReport):
                    bars.update(task, description=f"distilling, loss {report.loss:.4f}", completed=report.step)
                elif isinstance(report, ResumeReport):
                    bars.update(task, completed=report.step)
                elif isinstance(report, TornReport):
                    shared.console.print(f"Set aside {report.folder}: {report.reason}", markup=False, style="yellow")
                elif isinstance(report, DoneReport):
                    return report
    except TrainingDiverged as error:
        raise Usage(
            f"{error}: the rates are too high for this student; choose another --size or --batch, and another place "
            "with -o"
        ) from error
    raise AssertionError("training ends with a report")
