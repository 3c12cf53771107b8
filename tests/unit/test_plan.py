# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the plan of a machine: the kernel's arguments, and the order in which parts are joined."""

from vmspawn import MachineConfig
from vmspawn.boot.extras import Extras, fdset, join
from vmspawn.boot.plan import Choices, Kernel, _kernel_arguments
from vmspawn.boot.qemu import QemuBinary
from vmspawn.hotplug import places

BINARY = QemuBinary("qemu-system-x86_64", (7, 2, 0), "x86_64", False, False, True)


def chosen(config: MachineConfig, kernel: Kernel | None) -> Choices:
    return Choices(config, BINARY, "tcg", "", places.layout("q35", None), kernel)


def test_the_users_kernel_arguments_are_the_last() -> None:
    """The last argument has precedence, for every kind of boot."""
    config = MachineConfig(guest="builtin", kernel_arguments=("quiet", "ro"))
    guest = Kernel("kernel", "initrd", ("panic=-1",))
    expected = ("console=ttyS0", "panic=-1", "root=root", "rw", "quiet", "ro")
    assert _kernel_arguments(chosen(config, guest), ("root=root", "rw")) == expected
    by_smbios = _kernel_arguments(chosen(config._replace(guest=None), None), ("root=root", "rw"))
    assert by_smbios == ("console=ttyS0", "root=root", "rw", "quiet", "ro")


def test_the_kernels_timer_check_is_disabled_under_emulation() -> None:
    """The check fails on a busy host, and the kernel panics. The user's own arguments follow, and have precedence."""
    config = MachineConfig(linux="/dev/null", kernel_arguments=("quiet",))
    emulated = chosen(config, Kernel("/dev/null", None, ()))
    assert _kernel_arguments(emulated, ()) == ("console=ttyS0", "no_timer_check", "quiet")
    assert _kernel_arguments(emulated._replace(accelerator="kvm"), ()) == ("console=ttyS0", "quiet")


def test_parts_are_joined_in_their_order() -> None:
    first = Extras(machine=("a=1",), arguments=("-x", "1"), kernel_arguments=("one",))
    second = Extras(machine=("b=2",), kernel_arguments=("two",))
    joined = join(first, fdset(7, 3), second)
    assert joined.machine == ("a=1", "b=2")
    assert joined.arguments == ("-x", "1", "-add-fd", "fd=3,set=7")
    assert joined.descriptors == (3,)
    assert joined.kernel_arguments == ("one", "two")
    assert join() == Extras()
