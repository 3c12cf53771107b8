# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes the arguments of QEMU and of the guest's kernel for the console, the display and their devices.

The serial port is the default: firmware, boot loaders and every kernel support it, and the guest waits while its output
is not read. QEMU's virtio console drops output that does not fit into the pipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from ..hotplug import places
from .config import MachineConfig

#: The id of QEMU's character device for the console. The QMP command `chardev-window-size-changed` takes this id.
CHARDEV = "console"

#: The port through which the built-in guest learns the window's size: its name in the guest, and QEMU's id for it.
SIZE_PORT = "io.vmspawn.console-size"
SIZE_PORT_ID = "console-size"

#: The virtio-serial controller, and the numbers of its ports: those that exist from boot, and those that are plugged in
#: for commands in the guest. A command has a set of four ports, and there is room for 34 sets: 32 for running commands,
#: one that is plugged in ahead, and one that is being removed.
CONTROLLER = "serial"
_CONSOLE_NUMBER, _SIZE_NUMBER, _AGENT_NUMBER = 0, 1, 2
COMMAND_NUMBERS = range(3, 3 + 34 * 4)

#: The port for messages to the agent: its name in the guest, and QEMU's id for it.
AGENT_PORT = "io.vmspawn.agent"
AGENT_PORT_ID = "agent"

#: Interrupt vectors of a controller with many ports: one for changes of the configuration, and one for all queues. With
#: QEMU's default of one for each queue, a guest runs out of vectors.
_VECTORS = 2

#: Without KVM, a controller with many ports does not use event descriptors for notifications. QEMU would open one for
#: each queue, two for each port, whenever the guest starts to run, and close them whenever the guest stops; that takes
#: 12 ms.
_WITHOUT_EVENTS = {"ioeventfd": False}

_SERIAL_PORTS = {"q35": "ttyS0", "pc": "ttyS0", "virt": "ttyAMA0"}
_DISPLAYS = {"q35": "virtio-vga", "pc": "virtio-vga", "virt": "virtio-gpu-pci"}

#: These devices share the slot of the random number generator, so that they take no port for hot-plug. Function 0 is
#: the generator.
_FUNCTIONS = {"virtio-serial-pci": 1, "pvpanic-pci": 2, "virtio-keyboard-pci": 3, "virtio-vga": 4, "virtio-gpu-pci": 4}

_WITH_KEYBOARD = frozenset({"q35", "pc"})


def is_shared(config: MachineConfig) -> bool:
    """Return whether the manager shares the console among its viewers; otherwise QEMU has the terminal."""
    return config.console != "native"


def has_size_port(config: MachineConfig) -> bool:
    """Return whether the guest reads the window's size from a virtio port."""
    return config.guest == "builtin" and is_shared(config)


def tty(config: MachineConfig) -> str:
    """Return the guest's name for its console."""
    return "hvc0" if config.console_transport == "virtio" else _SERIAL_PORTS[config.machine_type]


def devices(config: MachineConfig, accelerator: str, size_socket: int, agent_socket: int, log: int) -> Iterable[str]:
    """Yield QEMU's arguments for the console, the display and their devices.

    The console is QEMU's standard input and output. `size_socket` and `agent_socket` are the listening sockets for
    these ports, or -1. `log` is the descriptor that QEMU logs the console to, or -1.
    """
    if is_shared(config):
        yield from shared_end(log)
    else:
        yield from ("-chardev", f"stdio,id={CHARDEV},mux=on,signal=off")
        yield from ("-mon", f"chardev={CHARDEV},mode=readline")
    if config.agent:
        ports = {"max_ports": COMMAND_NUMBERS.stop, "vectors": _VECTORS}
        if accelerator == "tcg":
            ports |= _WITHOUT_EVENTS
        yield from _device(config, "virtio-serial-pci", id=CONTROLLER, **ports)
    elif config.console_transport == "virtio" or has_size_port(config):
        yield from _device(config, "virtio-serial-pci", id=CONTROLLER, max_ports=2)
    if config.console_transport == "virtio":
        yield from _json_device({"driver": "virtconsole", "chardev": CHARDEV, **_port(_CONSOLE_NUMBER)})
    else:
        yield from ("-serial", f"chardev:{CHARDEV}")
    if has_size_port(config):
        yield from _socket_port("size", size_socket, SIZE_PORT_ID, SIZE_PORT, _SIZE_NUMBER)
    if config.agent:
        yield from _socket_port("agent", agent_socket, AGENT_PORT_ID, AGENT_PORT, _AGENT_NUMBER)
    yield from _device(config, "pvpanic-pci")
    if config.machine_type not in _WITH_KEYBOARD:
        yield from _device(config, "virtio-keyboard-pci")
    yield from _display(config)


def _socket_port(chardev: str, listener: int, device: str, name: str, number: int) -> Iterable[str]:
    """Yield the arguments for a port of the guest. The host's end is a listening socket."""
    yield from socket_end(chardev, listener)
    yield from _json_device(
        {"driver": "virtserialport", "id": device, "name": name, "chardev": chardev, **_port(number)}
    )


def _port(number: int) -> dict[str, object]:
    return {"bus": f"{CONTROLLER}.0", "nr": number}


def shared_end(log: int) -> tuple[str, str]:
    """Return the arguments for the host's end of a shared console. `log` is the descriptor of QEMU's log, or -1."""
    return ("-chardev", f"stdio,id={CHARDEV},signal=off{_logged(log)}")


def socket_end(chardev: str, listener: int) -> tuple[str, str]:
    """Return the arguments for the host's end of a port, which is a listening socket."""
    return ("-chardev", f"socket,id={chardev},fd={listener},server=on,wait=off")


def _logged(log: int) -> str:
    return "" if log < 0 else f",logfile=/proc/self/fd/{log},logappend=on"


def is_logged(config: MachineConfig) -> bool:
    """Return whether QEMU logs the console, to keep the output that the guest writes while no manager runs.

    QEMU logs no virtio console: the pipe keeps its output, and the console drops the output that does not fit into the
    pipe. QEMU logs no interactive console either: a system call for each byte makes an emulated serial port a third
    slower.
    """
    return is_shared(config) and config.console != "interactive" and config.console_transport == "serial"


def _display(config: MachineConfig) -> Iterable[str]:
    # The type virt has no -vga.
    no_vga = () if config.machine_type == "virt" else ("-vga", "none")
    if config.console != "gui":
        return ("-display", "none", *no_vga)
    return ("-display", "gtk", *no_vga, *_device(config, _DISPLAYS[config.machine_type]))


def _device(config: MachineConfig, driver: str, **properties: object) -> tuple[str, ...]:
    bus = "pci.0" if config.machine_type == "pc" else "pcie.0"
    address = f"{places.RNG_SLOT:x}.{_FUNCTIONS[driver]:x}"
    return _json_device({"driver": driver, **properties, "bus": bus, "addr": address})


def _json_device(properties: dict[str, object]) -> tuple[str, ...]:
    return ("-device", json.dumps(properties))


def kernel_arguments(config: MachineConfig) -> tuple[str, ...]:
    """Return the kernel's arguments for its console, and for the terminal of systemd or the built-in guest."""
    name = tty(config)
    if config.console == "gui":
        # The last console= is /dev/console. The user looks at the display.
        return (f"console={name}", "console=tty0")
    if config.terminal is None:
        return (f"console={name}",)
    terminal = config.terminal
    sizes = (("rows", terminal.rows), ("columns", terminal.columns))
    size = (f"systemd.tty.{what}.{name}={value}" for what, value in sizes if value)
    term = (f"systemd.tty.term.{name}={terminal.term}",) if terminal.term else ()
    return (f"console={name}", *term, *size)


def vendor_strings(config: MachineConfig) -> list[bytes]:
    """Return the SMBIOS string that makes systemd in an image open a login on the console.

    systemd 254 or newer reads this credential, whichever boot loader has loaded the kernel. The kernel's arguments,
    such as console=, are separate strings (`smbios.of_kernel_arguments`).
    """
    return [f"io.systemd.credential:getty.ttys.serial={tty(config)}".encode()]
