# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories by today's virtiofsd, which is written in Rust."""

from collections.abc import Callable

from tests.interop.box import Box
from tests.interop.conftest import make_image
from tests.interop.machines import BoxedMachine


def test_a_virtiofsd_that_dies_is_named_and_ends_the_machine(box: Box, spawn: Callable[..., BoxedMachine]) -> None:
    options = ("--firmware=bios", "--ram=64M", "--console=headless", "--bind=/usr:/mnt", "--bind-ro=/etc:/mnt2")
    machine = spawn(f"--image={make_image(box)}", *options)
    machine.wait_for("is running")
    assert "cannot forbid writing" not in machine.output["stderr"]
    box.run(
        "bash",
        "-c",
        f"kill -KILL $(systemctl show {machine.unit} --property=MainPID --value | "
        "xargs -I{} cat /proc/{}/task/{}/children | tr ' ' '\\n' | while read -r pid; do "
        '[ "$(cat /proc/$pid/comm)" = virtiofsd ] && echo $pid; done)',
    )
    assert machine.wait() == 1
    assert "virtiofsd, which served /" in machine.output["stderr"]
    assert machine.registration() is None
