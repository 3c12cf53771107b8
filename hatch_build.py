# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adds the man pages, completion scripts, the systemd unit and the compiled agents to the wheel.

The agents are in vmspawn/agent. All other files are in vmspawn/extras, from which `vmctl install-extras` copies them.
An editable install has none of these files.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs before and after hatchling makes the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the files and tell hatchling to include them."""
        if version == "editable":
            return
        root = Path(self.root)
        self._folder = tempfile.TemporaryDirectory(prefix="vmspawn-build-")
        made = Path(self._folder.name)
        for name, text in extras(root).items():
            target = made / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            build_data["force_include"][str(target)] = f"vmspawn/extras/{name}"
        for architecture, path in agents(root, made).items():
            build_data["force_include"][str(path)] = f"vmspawn/agent/agent-{architecture}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the files."""
        if version != "editable":
            self._folder.cleanup()


def agents(root: Path, folder: Path) -> dict[str, Path]:
    """Compile the agent for each architecture for which this host has a compiler; returns the paths by architecture.

    The agent runs only in guests, so the wheel still fits every host. If the wheel has no agent for an architecture,
    vmspawn compiles that agent at its first use.
    """
    sys.path.insert(0, str(root / "src"))
    try:
        from vmspawn.agent.build import build
        from vmspawn.agent.compiler import MACHINES
        from vmspawn.errors import StartError
    finally:
        sys.path.remove(str(root / "src"))
    found = {}
    for architecture in MACHINES:
        try:
            found[architecture] = Path(build(architecture, str(folder / "agent")))
        except StartError as error:
            print(f"no agent for {architecture}: {error}", file=sys.stderr)
    return found


def extras(root: Path) -> dict[str, str]:
    """Make the texts of the files; returns them by their paths below vmspawn/extras."""
    # The parsers import neither asyncvarlink nor msgspec, so a build needs no run-time dependency.
    sys.path.insert(0, str(root / "src"))
    try:
        man, completion = _load(root / "docs/man.py"), _load(root / "docs/completion.py")
    finally:
        sys.path.remove(str(root / "src"))
    return {
        **{f"man/{name}": text for name, text in man.pages().items()},
        **completion.scripts(),
        "systemd/vmspawn@.service": (root / "systemd/vmspawn@.service").read_text(),
    }


def _load(path: Path) -> Any:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"vmspawn_build_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
