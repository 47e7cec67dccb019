"""The wheel that users install."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_recipes_pages_and_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {f"triglot/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")}
    assert recipes <= set(names)
    assert "triglot/py.typed" in names
    assert any(name.startswith("triglot/insight/pages/") and name.endswith(".jinja") for name in names)


def test_a_command_runs_from_the_installed_wheel(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    dependencies = next(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    command = [str(python), "-m", "triglot", "train", "multi30k-en-de", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert '"kind": "encoder_decoder"' in done.stdout
    where = subprocess.run(
        [str(python), "-c", "import triglot; print(triglot.__file__)"], capture_output=True, text=True, check=True
    )
    assert str(site) in where.stdout
