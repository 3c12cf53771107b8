# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `./dev box make` with a box that exists. Making a box needs root and takes minutes."""

import os
import subprocess
import sys
from pathlib import Path


def test_an_existing_box_is_not_made_again(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.box", "make"],
        env={**os.environ, "VMSPAWN_BOX_TREE": str(tree)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"there is a box already, in {tree}; to make another, first: rm -r {tree}")
    assert sorted(tmp_path.rglob("*")) == [tree, tree / "etc"]
