"""The architecture as tests: who may import whom, and no global randomness."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("steering", "samplers", "rewards", "apps", "kernels")
ALLOWED = {
    "apps": {"apps", "samplers", "rewards", "steering", "kernels"},
    "samplers": {"samplers", "steering", "kernels"},
    "rewards": {"rewards", "steering", "kernels"},
    "steering": {"steering", "kernels"},
    "kernels": {"kernels"},
}
# Functions of torch and numpy that draw from a hidden global state unless given a generator.
GLOBAL_TORCH = {
    "rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "poisson",
    "rand_like", "randn_like", "randint_like", "manual_seed", "seed",
}  # fmt: skip
IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
NUMPY_OK = {"default_rng", "Generator", "Philox", "PCG64", "SeedSequence", "BitGenerator"}


def sources(*folders: str) -> list[Path]:
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]


def layer(module: str) -> str | None:
    """The folder a dotted name belongs to."""
    parts = module.split(".")
    if parts[0] != "steering":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "steering"


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def wrong_arrows(folder: str, text: str) -> list[str]:
    layers = [(name, layer(name)) for name in imported(ast.parse(text))]
    return [name for name, found in layers if found and found not in ALLOWED[folder]]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_right_only(folder):
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in sources(folder)
        # steering/__init__.py names the packages for type checkers only
        if (found := wrong_arrows(folder, path.read_text()))
    }
    assert not wrong


def test_a_wrong_arrow_is_seen():
    assert wrong_arrows("steering", "from steering.samplers import FK")
    assert wrong_arrows("rewards", "import steering.samplers.fk")
    assert wrong_arrows("samplers", "def f():\n    from steering import rewards")
    assert not wrong_arrows("apps", "from steering.samplers import FK")


def test_the_core_knows_no_method_and_no_reward_by_name():
    names = {p.stem for p in (ROOT / "samplers").glob("*.py")} - {"__init__", "base"}
    for path in (ROOT / "steering").glob("*.py"):
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        # The default of steer(method="fk") is the one name users see; a time grid is called "rbf",
        # and "auto" is a common value of options.
        homonyms = {"auto"} | ({"rbf"} if path.stem == "grids" else set())
        assert not (strings & names) - {"fk"} - homonyms, path


def global_draws(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        given = any(k.arg == "generator" for k in node.keywords)
        bad = (
            (owner == "torch" and name in GLOBAL_TORCH)
            or (name in IN_PLACE)
            or (owner == "torch.random" and name != "fork_rng")
            or (owner in ("np.random", "numpy.random") and name not in NUMPY_OK)
            or (owner == "random" and name != "Random")
        )
        if bad and not given:
            found.append(f"line {node.lineno}: {owner}.{name}")
    return found


def test_no_global_randomness():
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in sources(*FOLDERS)
        if (found := global_draws(path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "torch.randn(3)",
        "torch.multinomial(w, 2)",
        "np.random.rand()",
        "random.random()",
        "x.normal_()",
    ],
)
def test_global_randomness_is_seen(line):
    assert global_draws(line)


def test_generators_are_fine():
    assert not global_draws(
        "torch.randn(3, generator=g)\nnp.random.default_rng(0)\nrandom.Random(0)"
    )


def test_kernels_is_a_namespace_package():
    """A regular package named kernels would shadow Hugging Face's in the working directory."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_and_functions_stay_readable():
    long_files, long_functions = [], []
    for path in sources(*FOLDERS):
        text = path.read_text()
        if len(text.splitlines()) > 420:
            long_files.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.lineno + 1  # type: ignore[operator]
                doc = ast.get_docstring(node, clean=False) or ""
                if body - len(doc.splitlines()) > 60:
                    long_functions.append(f"{path.name}:{node.name} {body}")
    assert not long_files
    assert not long_functions
