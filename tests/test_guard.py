"""The shadow guard stops with both paths, before anything of the wrong package runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from train import guard


def run(*path: Path, code: str = "from train import guard; guard.check()"):
    """Run `code` in a process whose sys.path starts with `path` and then the checkout."""
    start = [str(item) for item in (*path, guard.CHECKOUT)]
    script = f"import sys; sys.path[:0] = {start!r}; {code}"
    return subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False
    )


def test_the_checkout_itself_passes_and_nothing_is_imported():
    code = "from train import guard; guard.check(); print(sorted(sys.modules))"
    result = run(code=code)
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("kernels", "models", "profiling", "torch"):
        assert f"'{name}'" not in result.stdout


@pytest.mark.parametrize("name", ["kernels", "models", "profiling"])
def test_a_package_of_the_same_name_is_named_with_both_paths(tmp_path, name):
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the wrong package ran')")
    result = run(tmp_path)
    assert result.returncode == 2
    assert str(package / "__init__.py") in result.stderr
    assert str(guard.CHECKOUT / name) in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_module_file_shadows_too(tmp_path):
    (tmp_path / "profiling.py").write_text("")
    result = run(tmp_path)
    assert result.returncode == 2
    assert str(tmp_path / "profiling.py") in result.stderr


def test_a_checkout_reached_through_a_link_passes(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(guard.CHECKOUT, target_is_directory=True)
    assert run(link).returncode == 0
