"""docs/architecture.md draws every file, and who imports whom: the package has no other file or import, and no circle;
results that travel between files have names."""

import ast
import functools
import re
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cosface_kernels"
ROW = re.compile(r"^\| `(\w+)/?` \| [^|]+ \| ([^|]*)\|$", re.MULTILINE)
ALLOWED = {part: set(re.findall(r"`(\w+)`", parts)) for part, parts in ROW.findall((ROOT / "docs/architecture.md").read_text())}
FILES = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")]


@functools.cache
def nodes_of(path):
    return [*ast.walk(ast.parse(path.read_text()))]


def module_of(path):
    return (path.parent if path.name == "__init__.py" else path.with_suffix("")).relative_to(PACKAGE).parts


@functools.cache
def imports(path):
    """The modules of the package that a file imports, wherever in the file."""
    here, found = path.parent.relative_to(PACKAGE).parts, set()
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            for name in node.names:
                parts = tuple(part for part in (*base, name.name) if part)
                is_module = PACKAGE.joinpath(*parts).with_suffix(".py").exists() or PACKAGE.joinpath(*parts).is_dir()
                found.add(parts if is_module else parts[:-1])
    return found


def test_tree_has_every_file():
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1].split("csrc/")[0]
    names = set(re.findall(r"[\w*]+\.py|\bdemo/", tree))
    found = {"demo/" if path.parent.name == "demo" else path.name for path in FILES if path.name != "__init__.py"}
    assert {name for name in found if not any(fnmatch(name, listed) for listed in names)} == set()
    assert {listed for listed in names if not any(fnmatch(name, listed) for name in found)} == set()


def test_no_part_imports_what_the_document_does_not_name():
    assert set(ALLOWED) == {module_of(path)[0] for path in FILES}
    found = {(module_of(path)[0], name[0]) for path in FILES for name in imports(path) if name}
    wrong = {(part, other) for part, other in found if part not in (other, "tools") and other not in ALLOWED[part]}
    assert found and not wrong


def test_every_part_imports_parts_above_it():
    above = [set(list(ALLOWED)[:place]) for place in range(len(ALLOWED))]
    assert len(ALLOWED) > 10 and all(others <= before for others, before in zip(ALLOWED.values(), above, strict=True))


def test_no_circle():
    graph = {module_of(path): {name for name in imports(path) if name != module_of(path)} for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(FILES)


def test_no_more_than_four_values_are_unpacked_by_position():
    """Five are counted by whoever reads them: they need names. But where they stand beside their names nobody counts."""
    wrong = []
    for path in FILES:
        nodes = nodes_of(path)
        beside = {id(each.targets[0]) for each in nodes if isinstance(each, ast.Assign) and isinstance(each.value, ast.Tuple)}
        unpacked = [each for each in nodes if isinstance(each, ast.Tuple | ast.List) and isinstance(each.ctx, ast.Store)]
        wrong += [f"{path}:{each.lineno}" for each in unpacked if len(each.elts) > 4 and id(each) not in beside]
    assert not wrong


# Take any number of arguments, each its own place: a kernel's launchers in triton_*.py, and `refuse` of the command's arguments.
LAUNCHERS = {"launch", "attend", "project", "add_pull", "self._attend", "self._normalize"}
OF_ANY_NUMBER = {"refuse"}


def test_no_more_than_six_arguments_are_passed_by_position():
    """Whoever reorders a signature would swap two unseen. Each element of a literal after a star counts."""
    wrong = []
    for path in FILES:
        exempt = OF_ANY_NUMBER | (LAUNCHERS if path.name.startswith("triton_") else set())
        for call in calls_outside_kernels(nodes_of(path)[0]):
            is_launch = isinstance(call.func, ast.Subscript)  # kernel[grid](...)
            if sum(map(places, call.args)) > 6 and not is_launch and ast.unparse(call.func) not in exempt:
                wrong.append(f"{path}:{call.lineno}")
    assert not wrong


def places(argument):
    is_literal = isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List)
    return len(argument.value.elts) if is_literal else 1


def calls_outside_kernels(node):
    """The calls below a node that are not in a function for triton.jit or gluon.jit."""
    for child in ast.iter_child_nodes(node):
        if any("jit" in ast.unparse(decorator) for decorator in getattr(child, "decorator_list", ())):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from calls_outside_kernels(child)
