"""Runs pyright on an installed tree.

Type checkers follow neither the package-dir mapping nor a package's own __path__, so the project
is installed into a temporary folder and checked there as users see it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        site = Path(name)
        link_packages(site)
        config = {
            "include": ["steering"],
            "exclude": ["steering/stickers/train"],
            "pythonVersion": "3.10",
            "typeCheckingMode": "basic",
            "venvPath": str(ROOT),
            "venv": ".venv",
            "reportPrivateImportUsage": False,
        }
        (site / "pyrightconfig.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "pyright", "-p", name, "--pythonpath", sys.executable]
        done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
        print(done.stdout.replace(f"{name}/", "").strip() or done.stderr)
        return done.returncode


def link_packages(site: Path) -> None:
    """The layout of an installed wheel, by symbolic links."""
    package = site / "steering"
    package.mkdir()
    for item in (ROOT / "steering").iterdir():
        (package / item.name).symlink_to(item)
    for name in ("samplers", "rewards", "apps", "kernels"):
        (package / name).symlink_to(ROOT / name)


if __name__ == "__main__":
    sys.exit(main())
