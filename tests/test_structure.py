"""The structure of the package: one importer of the host, imports point one way, all is typed."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "cryodrgn_amort"
LAYERS = [  # each may import from those below it
    {"__main__"},
    {"cli"},
    {"bench", "api"},
    {"notebook"},
    {"commands"},
    {"plugins"},
    {"builtin"},
    {"hookspecs"},
    {"study_report"},
    {"study_results", "claims"},
    {"study"},
    {"planfile"},
    {"plan", "timing", "mnist"},
    {"training", "report", "compare", "study_figures", "scores"},
    {"pictures", "trust", "resume"},
    {"pages"},
    {"figures", "surfaces", "definitions"},
    {"evaluation", "simulate"},
    {"gaps", "calibration"},
    {"posteriors"},
    {"truth", "embeddings", "measures"},
    {"results"},
    {"specimens", "folders"},
    {"runs"},
    {"settings", "origins"},
    {"inference"},
    {"model", "repair", "augment"},
    {"table", "inputs", "transforms", "latent", "sleep"},
    {"encoders"},
    {"sources", "feed", "noise", "poses", "epoch"},
    {"particles", "tilts", "shuffler", "metrics", "objective", "parallel", "decoding", "products"},
    {"checkpoints", "host"},
    {"files"},
    {"errors", "machine", "recipes", "interrupts", "progress", "draws", "private", "streams"},
]


def imports(path):
    """Yield the modules that are imported when the code runs: not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "cryodrgn_amort":
                yield from (f"cryodrgn_amort.{alias.name}" for alias in node.names)


def modules():
    return [p for p in SOURCE.rglob("*.py") if "startup" not in p.parts and p.name != "__init__.py"]


def test_only_one_module_imports_the_host():
    importers = {
        p.name for p in SOURCE.rglob("*.py") for m in imports(p) if m.split(".")[0] == "cryodrgn"
    }
    assert importers == {"host.py"}


PRIVATE = {  # what we use of others' private parts, and where; cli's _get_commands is wrapped
    ("private.py", "_Unpickler"),
    ("private.py", "_actions"),
    ("private.py", "_get_option_tuples"),
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


def test_imports_point_one_way():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in modules():
        here = path.stem if path.parent == SOURCE else path.parent.name
        assert here in level, f"{here} has no place in the layers"
        if here == "builtin":  # names what ships, whatever it is, when asked
            continue
        for module in imports(path):
            parts = module.split(".")
            if parts[0] != "cryodrgn_amort" or len(parts) < 2 or parts[1] not in level:
                continue
            inside = here == parts[1] and path.parent != SOURCE
            assert inside or level[here] < level[parts[1]], f"{here} imports {parts[1]}"


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys, cryodrgn_amort.cli\n"
        "from cryodrgn_amort.plugins import load_plugins\n"
        "load_plugins().commands()\n"
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
