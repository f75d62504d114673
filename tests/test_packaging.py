"""The package as users get it: a wheel, an editable install and a bare checkout."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOOK = (
    "import importlib.util as u, steering, steering.samplers, steering.rewards, steering.apps,"
    " steering.kernels;"
    "print(steering.__file__);"
    "print([n for n in ('samplers', 'rewards', 'apps') if u.find_spec(n)])"
)


def python(code: str, cwd: Path, *path: Path) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    source.mkdir()
    # built from the tracked files only, away from the checkout, which stays clean
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, files):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    (built,) = out.glob("diffusion_steering-*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"steering"}
    for needed in (
        "py.typed",
        "samplers/fk.py",
        "rewards/clip.py",
        "apps/cli.py",
        "stickers/atlas.png",
    ):
        assert f"steering/{needed}" in names
    assert any(n.endswith("weights/pipeline/model_index.json") for n in names)
    assert not [n for n in names if "test" in n.split("/")[-1]]


def test_the_installed_wheel_works_outside_the_tree(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    where, generic = python(LOOK, tmp_path, site)
    assert where.startswith(str(site))
    assert generic == "[]"
    (names,) = python(
        "import steering; print(steering.samplers.FK(n_particles=2).name)", tmp_path, site
    )
    assert names == "fk"


def test_the_editable_install_works_outside_the_tree(tmp_path):
    try:
        importlib.metadata.distribution("diffusion-steering")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed here: `make venv` installs the checkout as editable")
    where, generic = python(LOOK, tmp_path)
    assert where == str(ROOT / "steering" / "__init__.py")
    assert generic == "[]"


def test_the_bare_checkout_works(tmp_path):
    link = tmp_path / "checkout"
    link.mkdir()
    for name in ("steering", "samplers", "rewards", "apps", "kernels", "pyproject.toml"):
        (link / name).symlink_to(ROOT / name)
    python("import steering.samplers.fk, steering.rewards.base, steering.apps.cli", link)


def test_hugging_face_kernels_is_not_shadowed_in_the_repository_root():
    hub = importlib.metadata.version("kernels")
    code = (
        "import kernels, diffusers, transformers, steering.kernels;"
        "from diffusers import StableDiffusion3Pipeline; from transformers import CLIPTextModel;"
        "print(kernels.__file__)"
    )
    (where,) = python(code, ROOT)
    assert hub
    assert str(ROOT / "kernels") not in where


def test_importing_the_package_is_light(tmp_path):
    code = (
        "import sys, steering;"
        "heavy = ('torch', 'diffusers', 'transformers', 'open_clip');"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert python(code, tmp_path, ROOT) == ["[]"]
