# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests shared directories with the newest virtiofsd, which is written in Rust."""

from collections.abc import Callable

from tests.interop.box import Box
from tests.interop.conftest import make_image
from tests.interop.machines import BoxedMachine


def test_a_virtiofsd_that_dies_is_named_and_ends_the_machine(box: Box, spawn: Callable[..., BoxedMachine]) -> None:
    options = ("--firmware=bios", "--ram=64M", "--console=headless", "--bind=/usr:/mnt", "--bind-ro=/etc:/mnt2")
    machine = spawn(f"--image={make_image(box)}", *options)
    machine.wait_for("is running")
    assert "cannot refuse writes" not in machine.output["stderr"]
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


UID = 1234

#: Makes directories and an image for an unprivileged user. `$become` runs a command as this user, and `$spawn` is the
#: command that starts a machine.
AS_USER = f"""
set -e
mkdir -p /run/user/{UID} /var/tmp/user/shared
truncate --size=1M /var/tmp/user/image
chown -R {UID} /run/user/{UID} /var/tmp/user
become="setpriv --reuid={UID} --regid={UID} --clear-groups env HOME=/var/tmp/user XDG_RUNTIME_DIR=/run/user/{UID}"
spawn="vmspawn --image=/var/tmp/user/image --firmware=bios --ram=64M --console=headless -M users"
spawn="$spawn --bind=/var/tmp/user/shared:/mnt"
"""


def test_an_unprivileged_user_shares_a_directory(box: Box) -> None:
    script = f"""{AS_USER}
    $become $spawn 2>/tmp/users.log &
    tail --pid=$! --follow --lines=+1 /tmp/users.log | grep --quiet --max-count=1 "is running"
    $become vmctl terminate users
    wait $!
    """
    box.run("bash", "-c", f": >/tmp/users.log; {script}")
    assert "the machine was terminated" in box.path("/tmp/users.log").read_text()


def test_a_virtiofsd_that_cannot_start_is_named(box: Box) -> None:
    """Below chroot(2), no process may create the user namespace in which virtiofsd confines itself."""
    script = f"{AS_USER}\nmkdir -p /tmp/root; mount --rbind / /tmp/root; exec chroot /tmp/root $become $spawn"
    done = box.run("unshare", "--mount", "bash", "-c", script, check=False)
    assert done.returncode == 1
    assert "virtiofsd, which served /var/tmp/user/shared to the guest, exited with status 1" in done.stderr
    assert "Traceback" not in done.stderr
