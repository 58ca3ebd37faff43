"""The test builds what is installed from an index, and looks into it."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"


def test_wheel_and_sdist_have_the_files_that_are_no_code(tmp_path):
    for folder in ("hamner", "kernels"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True, timeout=120
    )
    (wheel,), (sdist,) = (tmp_path / "out").glob("*.whl"), (tmp_path / "out").glob("*.tar.gz")
    files = {
        path.relative_to(tmp_path).as_posix()
        for path in (tmp_path / "hamner").rglob("*")
        if path.is_file() and path.suffix != ".py" and "kernels" not in path.parts
    }
    assert "hamner/chat/page.html" in files
    assert files <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert files <= packed
