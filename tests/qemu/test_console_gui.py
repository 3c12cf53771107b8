# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests `--console=gui` without a display, and on GTK's Broadway, which needs no graphics."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import background, make_script, spawned, vmctl, vmspawn
from tests.terminal import END, attached


def test_gui_without_a_display_is_refused(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    done = vmspawn(*options, "-M", "blind", "--console=gui")
    assert done.returncode == 1
    assert "vmspawn: --console=gui needs a display" in done.stderr


@pytest.fixture
def windowed(qemu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield a script that runs QEMU on a Broadway server, because vmspawn passes no variables of GTK to QEMU."""
    broadway = shutil.which("broadwayd")
    displays = subprocess.run([qemu, "-display", "help"], capture_output=True, text=True, check=False).stdout
    if broadway is None or "gtk" not in displays.split():
        pytest.skip("no broadwayd, or a QEMU without GTK (libgtk-3-bin, qemu-system-gui)")
    monkeypatch.setenv("DISPLAY", ":5")
    settings = f"export GDK_BACKEND=broadway BROADWAY_DISPLAY=:5 XDG_RUNTIME_DIR={tmp_path}"
    command = [broadway, f"--unixsocket={tmp_path}/http", ":5"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    with background(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as server:
        assert server.stdout is not None
        assert b"Listening on" in server.stdout.readline()
        yield str(make_script(tmp_path / "qemu", f'{settings}\nexec {shutil.which(qemu)} "$@"'))


def test_gui_has_a_window_and_the_console_is_served_all_the_same(
    options: tuple[str, ...], windowed: str, tmp_path: Path
) -> None:
    with spawned(*options, "--console=gui", f"--qemu={windowed}") as running:
        running.wait_for("is running")
        # One socket listens, and one is connected to QEMU.
        assert Path("/proc/net/unix").read_text().count(f"@{tmp_path}/broadway") == 2
        assert '"VGA controller"' in vmctl("qmp", running.name, "query-pci").stdout
        with attached(running.name) as tty:
            tty.type(END)
            assert tty.wait(tty.processes[0]) == 0
        assert vmctl("terminate", running.name, "--wait").returncode == 0
        assert running.wait() == 0
    assert running.output["stdout"] == ""
