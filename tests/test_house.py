"""The house keeps its own rules: one alphabet in every einsum, small files, honest names, light imports."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcjax.alphabet import AXES

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
)
FILES = [ROOT / name for name in LISTED.stdout.splitlines() if (ROOT / name).is_file()]
PYTHON = [path for path in FILES if path.suffix == ".py"]
ENGINE = [path for path in PYTHON if path.is_relative_to(ROOT / "tcjax")]
NO_NAMES = ("utils", "util", "common", "misc", "helpers", "helper", "core")
MAX_LINES = 350


# Einsums -------------------------------------------------------------------------------------------------------------


def axes_of(node: ast.expr) -> str | None:
    """The axis suffix of `tokens_BNC`, `self.queries_QA` or `self.queries_QA[...]`; None for anything else."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value is Ellipsis:
        node = node.value
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    suffix = re.fullmatch(r".*[a-z0-9]_([A-Z]+)", name)
    return suffix[1] if suffix else None


def einsum_of(node: ast.expr) -> ast.Call | None:
    """The einsum whose axes an expression keeps: itself, cast by .astype, scaled, or shifted by a further term."""
    while True:
        if isinstance(node, ast.BinOp):
            node = node.left
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "astype":
            node = node.func.value
        else:
            return node if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "einsum" else None


def targets_of(tree: ast.AST) -> dict[int, str]:
    """{id of an einsum call: axis suffix of the name it is assigned to}, tuples taken apart."""
    found = {}
    for node in ast.walk(tree):
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign) and node.value:
            pairs = [(node.target, node.value)]
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=True)
            elif (call := einsum_of(value)) and (axes := axes_of(target)):
                found[id(call)] = axes
    return found


def einsum_faults(source: str) -> Iterator[str]:
    """One line per einsum of `source` whose letters differ from the names around it or from the alphabet."""
    tree = ast.parse(source)
    targets = targets_of(tree)
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "einsum"):
            continue
        where = f"line {call.lineno}"
        spec = call.args[0]
        if not (isinstance(spec, ast.Constant) and isinstance(spec.value, str) and "->" in spec.value):
            yield f"{where}: the spec is not a literal with an arrow"
            continue
        inputs, output = spec.value.replace(" ", "").split("->")
        terms, operands = inputs.split(","), call.args[1:]
        if len(terms) != len(operands):
            yield f"{where}: {spec.value!r} has {len(terms)} operands, the call {len(operands)}"
        unknown = sorted(set("".join(terms) + output) - set(AXES) - set("."))
        if unknown:
            yield f"{where}: {spec.value!r} uses {unknown}, which tcjax/alphabet.py does not know"
        named = [*zip(terms, map(axes_of, operands), strict=False), (output, targets.get(id(call)))]
        for term, axes in named:
            if axes is not None and axes != term:
                yield f"{where}: {spec.value!r} says {term!r} where the name ends in {axes!r}"


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_einsum_spells_the_letters_of_its_names(path):
    assert list(einsum_faults(path.read_text())) == []


def test_the_engine_has_einsums_to_read():
    assert sum(path.read_text().count("einsum(") for path in ENGINE) >= 3


BAD_EINSUMS = {
    'x_BQC = jnp.einsum("BQN,BNC->BQC", weights_BQM, tokens_BNC)': "where the name ends in 'BQM'",
    'x_BCQ = jnp.einsum("BQN,BNC->BQC", weights_BQN, tokens_BNC)': "where the name ends in 'BCQ'",
    'x_BCQ = jnp.einsum("BQN,BNC->BQC", weights_BQN, tokens_BNC).astype(jnp.float32) * scale': "ends in 'BCQ'",
    'a_B, x_BCQ = b_B, jnp.einsum("BQN,BNC->BQC", weights_BQN, tokens_BNC)': "where the name ends in 'BCQ'",
    'y = jnp.einsum("QA,BNA->BQN", self.queries_AQ[...], key_BNA)': "where the name ends in 'AQ'",
    'y = jnp.einsum("bqn,bnc->bqc", w, x)': "which tcjax/alphabet.py does not know",
    'y = jnp.einsum("BQN,BNC->BQC", weights_BQN)': "has 2 operands, the call 1",
    "y = jnp.einsum(spec, weights_BQN)": "not a literal",
}


@pytest.mark.parametrize("source", BAD_EINSUMS)
def test_a_wrong_einsum_is_caught(source):
    assert BAD_EINSUMS[source] in "\n".join(einsum_faults(source))


def test_a_right_einsum_passes():
    good = 'x_BQC = jnp.einsum("BQN,BNC->BQC", self.weights_BQN[...], tokens_BNC).astype(x.dtype) * scale'
    assert list(einsum_faults(good)) == []


# Files ---------------------------------------------------------------------------------------------------------------


def test_no_room_or_file_has_a_name_that_says_nothing():
    said = [path for path in PYTHON if {path.stem, *path.relative_to(ROOT).parent.parts} & set(NO_NAMES)]
    assert said == []


def test_every_python_file_stays_readable_at_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PYTHON}
    assert len(lengths) > 30
    assert {name: length for name, length in lengths.items() if length >= MAX_LINES} == {}


# Each pattern holds a character class, so that this file does not match itself.
FOREIGN = {
    "a path of one machine": r"(?<![\w.])/(?:wor[k]|hom[e]|roo[t]|User[s]|tm[p]/w)/",
    "a package registry": r"(?i)py[p]i\.org|python[h]osted|download\.py[t]orch|registry\.np[m]js|index-u[r]l",
    "a secret": r"AKI[A][0-9A-Z]{16}|-----BEGI[N] [A-Z ]*PRIVATE KEY|hf_[A-Za-z]{30}|gh[p]_[A-Za-z0-9]{30}",
}
FOREIGN_EXAMPLES = ("cd /wo" "rk/main", "--index-" "url=https://x", "https://py" "pi.org/simple")  # fmt: skip


def foreign(text: str) -> list[str]:
    return [f"{what}: {match[0]}" for what, pattern in FOREIGN.items() for match in re.finditer(pattern, text)]


def test_no_file_names_a_machine_a_registry_or_a_secret():
    found = {}
    for path in FILES:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures and weights
        if faults := foreign(text):
            found[str(path.relative_to(ROOT))] = faults
    assert found == {}


@pytest.mark.parametrize("text", FOREIGN_EXAMPLES)
def test_a_foreign_path_is_caught(text):
    assert foreign(text)


def test_every_link_in_the_guides_leads_to_a_file():
    broken = []
    for path in (path for path in FILES if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img [^>]*src=\"([^\"]+)\"", path.read_text()):
            link = "".join(target)
            if "://" not in link and not (path.parent / link).exists():
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert broken == []


def test_pins_are_exact():
    for name in ("core", "dev"):
        lines = [line for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines() if line[0] not in "#-"]
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
        assert [line for line in lines if line.startswith(("nvidia", "triton", "tensorflow=="))] == []


# Imports -------------------------------------------------------------------------------------------------------------


def imported_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(out.split())


def test_the_package_itself_imports_no_jax():
    assert not {"jax", "numpy", "flax"} & imported_by("import tcjax, tcjax.alphabet, tcjax.batch, tcjax.config")


def test_the_engine_needs_no_extra():
    """Every module but the PyTorch twins, imported at once: what the core install has to carry."""
    modules = [path.relative_to(ROOT).with_suffix("") for path in ENGINE if path.stem != "__init__"]
    names = [".".join(module.parts) for module in modules if module.parts[:3] != ("tcjax", "export", "torch")]
    imported = imported_by(f"import {', '.join(names)}")
    assert {"tcjax", "jax", "flax", "grain"} <= imported
    assert not {"torch", "transformers", "wandb", "tensorflow", "sklearn"} & imported


def test_the_command_line_answers_without_jax():
    assert not {"jax", "flax", "tensorflow_datasets"} & imported_by("import tcjax.cli")
