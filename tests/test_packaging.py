"""Packaging: the wheel contains all modules of the tree under their names."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import fastgpt
from fastgpt import _optional

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("fastgpt", "kernels", "pyproject.toml", "setup.py", "LICENSE", "README.md")


def build(kind: str, tree: Path, out: Path) -> Path:
    """Call the build backend in a source tree, as pip does. ``kind``: wheel, sdist, editable."""
    code = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
    out.mkdir()
    subprocess.run([sys.executable, "-c", code.format(kind), str(out)], cwd=tree, check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("tree")
    for name in _SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tree, tmp_path_factory.mktemp("wheel") / "dist"))


def contents(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """Path → bytes of all files except the metadata."""
    return {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


@pytest.fixture(scope="module")
def fields(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_string(metadata(wheel, "METADATA"))


def declared(key: str) -> str:
    """A string in pyproject.toml (Python 3.10 has no parser for it)."""
    (value,) = re.findall(rf'^{key} = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    return str(value)


def test_the_wheel_holds_the_modules_of_the_tree_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    modules = (ROOT / "fastgpt").rglob("*.py")
    expected = {str(path.relative_to(ROOT)): path for path in modules}
    expected |= {f"fastgpt/kernels/{path.name}": path for path in (ROOT / "kernels").glob("*.py")}
    assert {"fastgpt/data/batches.py", "fastgpt/kernels/attention.py"} <= expected.keys()
    assert contents(wheel) == {name: path.read_bytes() for name, path in expected.items()}


def test_name_version_and_command(wheel: zipfile.ZipFile, fields: Message) -> None:
    assert fields["Name"] == declared("name") == "fastgpt-triton"
    assert fields["Version"] == declared("version")
    assert fields["Requires-Python"] == declared("requires-python") == ">=3.10"
    assert fields["License-Expression"] == "MIT"
    assert "[console_scripts]\nfastgpt = fastgpt.__main__:main" in metadata(
        wheel, "entry_points.txt"
    )
    assert metadata(wheel, "top_level.txt").split() == ["fastgpt"]


def test_the_installed_version_is_the_declared_one() -> None:
    if fastgpt.__version__ == "0+unknown":
        pytest.skip("fastgpt is not installed")
    assert fastgpt.__version__ == declared("version")


def test_a_wheel_made_from_the_sdist_is_the_same(
    wheel: zipfile.ZipFile, tree: Path, tmp_path: Path
) -> None:
    with tarfile.open(build("sdist", tree, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel"))
    assert contents(again) == contents(wheel)


def test_a_wheel_made_without_the_link_is_the_same(
    wheel: zipfile.ZipFile, tree: Path, tmp_path: Path
) -> None:
    """git on Windows does not create the link."""
    shutil.copytree(tree, tmp_path / "tree", symlinks=True)
    (tmp_path / "tree" / "fastgpt" / "kernels").unlink()
    again = zipfile.ZipFile(build("wheel", tmp_path / "tree", tmp_path / "wheel"))
    assert contents(again) == contents(wheel)


def test_an_editable_install_beside_a_clone(tree: Path, tmp_path: Path) -> None:
    """Start Python in the parent folder of the clone, which has the same name as the package,
    ``fastgpt``."""
    clone = tmp_path / "fastgpt"
    shutil.copytree(tree, clone, symlinks=True)
    site = tmp_path / "site"
    zipfile.ZipFile(build("editable", clone, tmp_path / "dist")).extractall(site)
    code = f"""
import site, sys
sys.path.append({sysconfig.get_path("purelib")!r})  # torch; what is installed there by .pth is not
site.addsitedir({str(site)!r})
import fastgpt
from fastgpt import _optional
from fastgpt.kernels import reference
print(fastgpt.GPTConfig.__module__, reference.__file__)
"""
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    module, path = run.stdout.split() or pytest.fail(run.stderr)
    assert module == "fastgpt.language_model"
    assert Path(path).resolve() == (clone / "kernels" / "reference.py").resolve()


def test_the_kernels_are_one_folder_with_a_committed_link() -> None:
    assert os.readlink(ROOT / "fastgpt" / "kernels") == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()  # would claim the name `kernels`
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--stage", "fastgpt/kernels"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.startswith("120000 "), listed.stdout


def test_hints_name_what_can_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project is on no index: in a clone hints name its extra, else the package itself."""
    root = Path(_optional.__file__).parents[1]
    for clone, hint in (
        (root, f'pip install -e ".[log]" in {root}'),
        (tmp_path, "pip install fig"),
    ):
        monkeypatch.setattr(_optional, "_CLONE", clone)
        with pytest.raises(ImportError) as raised:
            _optional.optional("fig.plots", "plot", "log")
        assert str(raised.value) == f"plot needs fig: {hint}"
