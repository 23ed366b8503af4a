"""The structure of the package: rooms with faces, one direction, one importer of the host."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "cryodrgn_amort"
PACKAGE = SOURCE.name
# Each room, and those that it may import: the rooms of a line are below those of the next ones.
ROOMS = {
    "core": "",
    "host": "core",
    "options": "core",
    "measures": "core",
    "data": "core host",
    "models": "core host options data",
    "runs": "core host options data models",
    "simulation": "core host options data models runs",
    "training": "core host options data models runs",
    "inference": "core options data measures models runs",
    "report": "core host options measures runs",
    "evaluation": "core options data measures models simulation runs inference report",
    "study": "core host options data measures models simulation runs training inference report",
    "plugins": "core options data models training report",
    "cli": "core options simulation runs training inference report evaluation study plugins",
    "api": "core options simulation runs training inference report evaluation study plugins",
    "bench": "core host options data models runs training inference evaluation plugins",
    "__main__": "cli",
    "__init__": "core plugins api",
}
MOST_FLOORS, MOST_ENTRIES = 8, 20
# What is not longer than it may be: lines of a file, a class, a function.
MOST_LINES = {"file": 400, "class": 300, "function": 60}


def imports(path):
    """Yield all modules that a file imports, wherever in it, and the names taken from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"{'.'.join(_module(path).split('.')[:-1])}.{node.module}", None
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.module == PACKAGE:
                yield from ((f"{PACKAGE}.{name}", None) for name in names)
            else:
                yield node.module, names


def _module(path):
    return ".".join((PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts))


def room(module):
    return module.split(".")[1]


def modules():
    return [p for p in SOURCE.rglob("*.py") if "startup" not in p.parts]


@cache
def arrows():
    """Return all imports of one room by another: (file, room, its room, module, names)."""
    return [
        (path.relative_to(SOURCE), room(_module(path)), room(module), module, names)
        for path in modules()
        for module, names in imports(path)
        if module.startswith(f"{PACKAGE}.") and room(module) in ROOMS
    ]


def test_only_one_module_imports_the_host():
    importers = {p.name for p in modules() for m, _ in imports(p) if m.split(".")[0] == "cryodrgn"}
    assert importers == {"host.py"}


PRIVATE = {  # what we use of others' private parts, and where; cli's _get_commands is wrapped
    ("private.py", "_Unpickler"),
    ("private.py", "_actions"),
    ("private.py", "_get_option_tuples"),
    ("private.py", "_foreach_mul_"),
    ("private.py", "_foreach_norm"),
    ("host.py", "_process"),
}


def test_private_parts_of_others_are_used_in_one_place_each():
    """Names with a leading underscore that the module does not give itself; types aside."""
    found = set()
    for path in modules():
        tree = ast.parse(path.read_text())
        typed = {
            id(inner)
            for node in ast.walk(tree)
            for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
            if part is not None
            for inner in ast.walk(part)
        }
        own = {getattr(node, "name", None) for node in ast.walk(tree)}
        own |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)
                and isinstance(n.target, ast.Name)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
            else:
                names = [node.attr] if isinstance(node, ast.Attribute) else []
            of_self = isinstance(getattr(node, "value", None), ast.Name) and node.value.id in (
                "self", "cls",
            )  # fmt: skip
            for name in names:
                private = name.startswith("_") and not name.startswith("__")
                if private and not of_self and name not in own and id(node) not in typed:
                    found.add((path.name, name))
    assert found - {(path, "_exit") for path, _ in found} == PRIVATE


def test_texts_are_read_and_written_in_an_encoding_of_ours():
    """Not in that of the machine, which may lack letters."""
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            given = [getattr(arg, "value", None) for arg in node.args]
            binary = any(isinstance(mode, str) and "b" in mode for mode in given[1:])
            opens = name in ("open", "fdopen") and len(given) > 1 and isinstance(given[1], str)
            texts = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
            said = {word.arg for word in node.keywords} & {"encoding", "errors"}
            if (
                (texts or (opens and not binary))
                and not said
                and not {"utf-8", "ascii"} & set(given)
            ):
                found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_imports_point_down():
    for path, here, there, module, _ in arrows():
        assert here == there or there in ROOMS[here].split(), f"{path} imports {module}"


def test_the_plan_of_rooms_is_that_of_the_imports():
    """No room is missing, no arrow is left over; they have few floors, and no circle."""
    found = {name: set() for name in ROOMS}
    for _, here, there, _, _ in arrows():
        if here != there:
            found[here].add(there)
    assert found == {name: set(below.split()) for name, below in ROOMS.items()}
    floors = {}
    for name in ROOMS:  # those below come first
        floors[name] = 1 + max((floors[below] for below in found[name]), default=0)
    ends = {"__main__", "__init__"}
    assert max(floor for name, floor in floors.items() if name not in ends) <= MOST_FLOORS
    entries = [p for p in SOURCE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES
    assert {p.stem for p in entries} - {"py"} == ROOMS.keys()


def test_others_import_the_face_of_a_room():
    """``from cryodrgn_amort.ROOM import NAME``, a name that the room's ``__init__.pyi`` has."""
    for path, here, there, module, names in arrows():
        if here == there or there in ("host", "api") or here == "__init__":
            continue
        face = module.split(".")[1:]
        assert face in ([there], ["study", "digits"], ["study", "validation"]), (
            f"{path} imports {module}"
        )
        assert names, f"{path} imports {module} itself"
        missing = set(names) - set(importlib.import_module(module).__all__)
        assert not missing, f"{path}: {module} has no {missing} in its face"


def test_faces_name_what_is_there_and_is_used_by_others():
    """Or by users: what a plugin needs."""
    used = {(module, name) for _, here, there, module, names in arrows() if here != there
            for name in names or ()}  # fmt: skip
    for stub in SOURCE.rglob("__init__.pyi"):
        module = ".".join((PACKAGE, *stub.parent.relative_to(SOURCE).parts))
        face = importlib.import_module(module)
        assert face.__doc__.count("\n") == 0, f"{module}: its purpose in one line"
        for name in face.__all__:
            getattr(face, name)
            assert not (stub.parent / f"{name}.py").exists(), f"{module}.{name} is a file as well"
        unused = {name for name in face.__all__ if (module, name) not in used}
        assert unused <= FOR_PLUGINS.get(module.removeprefix(f"{PACKAGE}."), set()), unused


# What plugins, notebooks and our start-up file use.
FOR_PLUGINS = {
    "core": {"InputError", "Stopped"},
    "data": {"Noise", "Twin", "Transform", "TransformSpec", "Roll", "Rotation", "EncoderInput"},
    "models": {"Encoder", "EncoderSpec", "InputSpec"},
    "report": {"Section", "Evaluation"},
    "plugins": {"Plugins", "hookimpl"},
    "cli": {"join_host", "main"},
}


def test_nothing_is_too_long_to_read():
    found = []
    for path in modules():
        text = path.read_text()
        parts = [("file", path.name, len(text.splitlines()))]
        for node in ast.walk(ast.parse(text)):
            kind = {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(node))
            if kind is not None:
                parts.append((kind, node.name, node.end_lineno - node.lineno + 1))
        found += [(path.name, *part) for part in parts if part[2] > MOST_LINES[part[0]]]
    assert not found


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys\n"
        "from cryodrgn_amort.cli import main\n"
        "main(['amort_plugins'])\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'umap', 'cryodrgn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ruff_and_mypy_have_nothing_to_say():
    root = SOURCE.parent
    for tool in (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]):
        found = subprocess.run(
            [sys.executable, "-m", *tool], cwd=root, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout + found.stderr
