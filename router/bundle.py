"""One self-contained file out of the modules that already do the work, so that a folder's code is never a second one.

`bundle` starts from names, follows what their source refers to through this package's own imports, and writes those
definitions, comments included, into one module that imports nothing of paris_swarm. Nothing is imported or run on the
way: only source text is read. What it cannot flatten faithfully it refuses.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "paris_swarm."
SUBSTITUTES = {
    ("paris_swarm.dht_schemas.digest", "blake3_hex"): (
        "paris_swarm.router.pipeline_code.plain_blake3",
        "plain_blake3_hex",
    ),
}
"""Definitions that a bundle takes from elsewhere, because theirs need a package that may not be installed there."""


class CannotBundle(ValueError):
    """The source uses something that one flat file cannot hold: the message names the module and what it is."""


@dataclass
class _Module:
    """A module's source, cut at its top level. definitions: name -> the statement that makes it; own: name -> (module,
    name there) for what comes from this package; foreign: name -> an import statement of something else."""

    name: str
    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    own: dict[str, tuple[str, str]] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)


def bundle(module: str, names: Iterable[str], *, heading: str) -> str:
    """Source of a module that defines `names` of `module` and all they need; `heading` becomes its docstring.

    Raises:
        CannotBundle: two modules define the same name differently, a name is not found, or an import of this package
            is not at the top of its module. OSError: a source file is not there.
    """
    modules: dict[str, _Module] = {}
    order: list[str] = []
    wanted: dict[str, set[str]] = {}
    owner: dict[str, str] = {}
    imports: set[str] = set()
    aliases: dict[str, str] = {}

    def load(name: str) -> _Module:
        if name not in modules:
            modules[name] = _read(name)
        return modules[name]

    def want(name: str, attribute: str) -> None:
        here = load(name)
        if attribute in here.own:
            want(*here.own[attribute])
            return
        if attribute in here.foreign:
            imports.add(here.foreign[attribute])
            return
        if attribute not in here.definitions:
            raise CannotBundle(f"{name} defines no {attribute}")
        if owner.setdefault(attribute, name) != name:
            raise CannotBundle(f"{attribute} is defined by {owner[attribute]} and by {name}: rename one")
        if attribute in wanted.setdefault(name, set()):
            return
        wanted[name].add(attribute)
        for used in sorted(_names(here.definitions[attribute])):
            if used in here.own:
                target = here.own[used]
                if target[1] != used:
                    aliases[used] = target[1]
                want(*target)
            elif used in here.definitions or used in here.foreign:
                want(name, used)
        if name not in order:
            order.append(name)  # after what it needs: a definition may be used while the file is read

    for attribute in names:
        want(module, attribute)
    _check_aliases(aliases, owner)
    parts = [f'"""{heading}"""', "from __future__ import annotations", "\n".join(sorted(imports))]
    for name in _in_dependency_order(order, modules, wanted):
        here = modules[name]
        statements = {id(here.definitions[each]): here.definitions[each] for each in wanted[name]}
        parts.append(f"# {'-' * 117}\n# from {name}\n# {'-' * 117}")
        parts += [_source(here, node) for node in sorted(statements.values(), key=lambda node: node.lineno)]
        parts += [f"{alias} = {target}" for alias, target in sorted(aliases.items()) if target in wanted[name]]
    text = "\n\n".join(parts) + "\n"
    _check_whole(text)
    return text


def _read(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise CannotBundle(f"there is no source of {name}")
    text = Path(spec.origin).read_text(encoding="utf-8")
    here = _Module(name, text.splitlines())
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound = alias.asname or alias.name
                if f"{node.module}".startswith(PACKAGE):
                    here.own[bound] = SUBSTITUTES.get((f"{node.module}", alias.name), (f"{node.module}", alias.name))
                elif node.module != "__future__":
                    here.foreign[bound] = f"from {node.module} import {ast.unparse(alias)}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                here.foreign[alias.asname or alias.name.split(".")[0]] = f"import {ast.unparse(alias)}"
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            here.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for each in (leaf for target in targets for leaf in ast.walk(target)):
                if isinstance(each, ast.Name):
                    here.definitions[each.id] = node
    return here


def _names(node: ast.stmt) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.ImportFrom | ast.Import):
            source = each.module if isinstance(each, ast.ImportFrom) else each.names[0].name
            if f"{source}".startswith(PACKAGE):
                raise CannotBundle(f"an import of {source} within a function: put it at the top of its module")


def _in_dependency_order(
    order: list[str], modules: Mapping[str, _Module], wanted: Mapping[str, set[str]]
) -> Iterator[str]:
    """Modules so that each comes after those whose definitions it uses."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        here = modules[name]
        used = {each for attribute in wanted[name] for each in _names(here.definitions[attribute])}
        for target in sorted({here.own[each][0] for each in used if each in here.own}):
            if target in wanted:
                visit(target)
        done.append(name)

    for name in order:
        visit(name)
    return iter(done)


def _source(here: _Module, node: ast.stmt) -> str:
    """A statement as it stands in the file, with its decorators and the string that documents a constant."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)])
    return "\n".join(here.lines[first - 1 : node.end_lineno])


def _check_aliases(aliases: Mapping[str, str], owner: Mapping[str, str]) -> None:
    for alias in aliases:
        if alias in owner:
            raise CannotBundle(f"{alias} is an import under another name, and {owner[alias]} defines it: rename one")


def _check_whole(text: str) -> None:
    """Every name that a bundle uses is defined in it, imported by it or built in."""
    tree = ast.parse(text)
    bound = set(dir(builtins)) | {"__class__", "__file__", "__name__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    free = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - bound
    if free:
        raise CannotBundle(f"nothing defines {', '.join(sorted(free))}")
