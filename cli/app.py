"""`paris-swarm`: one verb a file in `verbs/`; this file only gathers them and turns errors into exit codes.

Nothing heavy is imported here: `paris-swarm --help` answers in half a second.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

import typer

from paris_swarm.cli import exits
from paris_swarm.cli.settings import HomeOption, JsonOption
from paris_swarm.cli.verbs import (
    assemble,
    audit,
    bootstrap,
    demo,
    distill,
    evaluate,
    export,
    identity,
    import_,
    init,
    invite,
    join,
    leave,
    notice,
    prepare,
    router,
    sample,
    status,
    store,
    verify,
)

app = typer.Typer(
    name="paris-swarm",
    help="Train diffusion experts peer to peer: claim a cluster, train it alone, assemble and draw what verifies.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 usage, 3 swarm not reachable, 4 verification failed, 5 swarm incomplete, "
    "6 no space or no permission on disk, 130 interrupted.",
)


@app.callback()
def shared(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Options here are also accepted after the verb."""
    context.obj = {"home": home, "json": as_json}


app.command("prepare")(prepare.prepare)
app.command("init")(init.init)
app.command("bootstrap")(bootstrap.bootstrap)
app.command("invite")(invite.invite)
app.command("notice")(notice.notice)
app.command("join", cls=join.JoinCommand)(join.join)
app.command("status")(status.status)
app.command("assemble")(assemble.assemble)
app.command("verify", cls=verify.VerifyCommand)(verify.verify)
app.command("audit")(audit.audit)
app.command("sample")(sample.sample)
app.command("evaluate")(evaluate.evaluate)
app.command("distill")(distill.distill)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.add_typer(identity.app, name="identity")
app.add_typer(store.app, name="store")
app.add_typer(router.app, name="router")
app.command("leave")(leave.leave)
app.command("demo")(demo.demo)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run one verb, exit with its documented code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    logging.basicConfig(level=os.environ.get("PARIS_SWARM_LOG", "ERROR"), format="%(levelname)s %(name)s: %(message)s")
    # SIGTERM ends a verb as Ctrl-C does: what is half written is removed, what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one verb and return its exit code; errors a person can meet become one line on standard error."""
    try:
        result: Any = app(args=arguments, prog_name="paris-swarm", standalone_mode=False)
    except BaseException as error:  # noqa: BLE001 (the one place where every error becomes an exit code or is raised on)
        return _explain(error)
    code = result if isinstance(result, int) else exits.OK
    if code == exits.INTERRUPTED:  # typer makes a Ctrl-C this code without a word
        sys.stderr.write("Interrupted.\n")
    return code


def _explain(error: BaseException) -> int:
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else exits.OK if error.code is None else exits.BUG
    if "Exit" in names:  # typer.Exit
        return int(getattr(error, "exit_code", exits.OK))
    if "Abort" in names:  # Ctrl-C inside typer
        sys.stderr.write("Interrupted.\n")
        return exits.INTERRUPTED
    if "ClickException" in names:
        error.show()  # type: ignore[attr-defined]
        return exits.USAGE
    if isinstance(error, BaseExceptionGroup):
        return _explain(error.exceptions[0])
    code = exits.exit_code(error)
    if code is None:
        raise error
    message = "Interrupted." if code == exits.INTERRUPTED else f"Error: {exits.words(error)}"
    sys.stderr.write(message + "\n")
    return code


if __name__ == "__main__":
    main()
