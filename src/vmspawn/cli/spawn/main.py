# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `vmspawn`: options in, a machine's life, an exit status out.

QEMU is started as soon as the options are understood; asyncio, asyncvarlink and the rest are imported while it comes
up.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ... import log
from ...boot import config as configuration
from ...boot.config import ConsoleTerminal, MachineConfig
from ...boot.launch import END_SIGNALS
from ...console.hotkeys import HELP
from ...console.messages import Voice
from ...console.terminal import Terminal, is_foreground, window_size
from ...errors import UsageError
from ...host import storageprovider
from ...host.runtime import check_name
from ...images import named_images
from ...storage.disk import BUSES, ON_ERROR_CHOICES, parse_extra_drive
from ...storage.formats import FORMATS
from ...version import VERSION
from .. import adopt, entrypoint, volumes
from ..entrypoint import EXIT_FAILURE
from ..parser import Formatter, Parser, boolean
from . import boot, guest, shares, system, unsupported_options

_PROGRAM = "vmspawn"

_STDIN, _STDOUT = 0, 1


def build_parser() -> Parser:
    """The command's options; those of systemd-vmspawn(1) have its names, values and meanings."""
    parser = Parser(
        prog=_PROGRAM,
        usage="vmspawn [OPTION…] [KERNEL ARGUMENT…]",
        description="Start a virtual machine and stay beside it as its manager.",
        epilog="Drive the running machine with vmctl, machinectl or varlinkctl.",
        formatter_class=Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    _add_general(parser)
    _add_boot(parser)
    _add_machine(parser)
    _add_storage(parser)
    boot.add(parser)
    shares.add(parser)
    guest.add(parser)
    system.add(parser)
    unsupported_options.add(parser)
    _add_former_names(parser)
    parser.add_argument("kernel_arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _add_general(parser: Parser) -> None:
    group = parser.add_argument_group("General")
    group.add_argument("-h", "--help", action="help", help="show this help")
    group.add_argument("--version", action="version", version=f"vmspawn {VERSION}", help="show the version")
    words = group.add_mutually_exclusive_group()
    words.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    words.add_argument("-v", "--verbose", action="store_true", help="say what was chosen, and what is gone without")
    group.add_argument("-M", "--machine", metavar="NAME", help="the machine's name (default: from what boots)")
    adopt.add_options(group)
    group.add_argument("--qmp-log", metavar="FILE", default="", help="write down what is said on QEMU's monitors")
    group.add_argument("--uuid", metavar="UUID", help="the machine's UUID")
    group.add_argument(
        "--console",
        choices=configuration.CONSOLES,
        help="the guest's console: interactive (default on a terminal), read-only (default elsewhere), native "
        "(QEMU has the terminal), gui (QEMU's window) or headless",
    )
    group.add_argument(
        "--console-transport",
        choices=configuration.CONSOLE_TRANSPORTS,
        default=configuration.CONSOLE_TRANSPORTS[0],
        help="what it is to the guest: serial is ttyS0 (default), virtio is hvc0",
    )
    group.add_argument("--log", metavar="FILE", help="append what the console shows to a file")
    group.add_argument(
        "--shutdown-timeout",
        metavar="SECONDS",
        type=float,
        default=configuration.SHUTDOWN_TIMEOUT,
        help="how long the guest may take to power off once asked (default: %(default)g)",
    )


def _add_boot(parser: Parser) -> None:
    group = parser.add_argument_group("What boots")
    group.add_argument("--guest", choices=("builtin",), help="a tiny guest that vmspawn makes itself")
    group.add_argument("-i", "--image", metavar="PATH", help="a disk image or block device")
    group.add_argument("--image-format", choices=FORMATS, help="the image's format (default: raw)")
    group.add_argument(
        "--image-disk-type",
        choices=BUSES,
        default=BUSES[0],
        help="its bus, and that of extra disks that name none (default: %(default)s)",
    )
    group.add_argument(
        "-x", "--ephemeral", action="store_true", help="leave the image as it is: what is written is lost"
    )
    group.add_argument("-G", "--grow-image", metavar="BYTES", help="make the image at least that large first")
    group.add_argument("--linux", metavar="PATH", help="a kernel to boot directly")
    group.add_argument(
        "--initrd", metavar="PATH", action="append", default=[], help="the initrd for --linux=; several make one"
    )


def _add_machine(parser: Parser) -> None:
    group = parser.add_argument_group("The machine")
    group.add_argument("--cpus", metavar="N", type=int, default=1, help="virtual processors (default: %(default)s)")
    group.add_argument(
        "--ram",
        metavar="BYTES[:MAX[:SLOTS]]",
        help="memory, with K, M, G or T, and how far it may grow (default: 2G; builtin guest: 256M)",
    )
    group.add_argument("--kvm", metavar="BOOL|auto", default="auto", help="use KVM (default: %(default)s)")
    group.add_argument(
        "--machine-type",
        choices=configuration.MACHINE_TYPES,
        default="q35",
        help="QEMU's machine (default: %(default)s)",
    )
    group.add_argument("--qemu", metavar="PATH", help="the QEMU to use")
    group.add_argument(
        "--qemu-arg",
        metavar="ARG",
        action="append",
        default=[],
        help="an argument for QEMU, as a last resort; repeatable",
    )


def _add_storage(parser: Parser) -> None:
    group = parser.add_argument_group("Disks")
    group.add_argument(
        "--discard-disk",
        metavar="BOOL",
        type=lambda text: boolean("--discard-disk=", text) == "yes",
        default=True,
        help="whether what the guest discards is given back to the host (default: yes)",
    )
    group.add_argument(
        "--extra-drive",
        metavar="[FORMAT:][DISKTYPE:]PATH",
        action="append",
        default=[],
        help="another disk, there from boot; repeatable",
    )
    group.add_argument(
        "--bind-volume",
        metavar=storageprovider.SYNTAX,
        action="append",
        default=[],
        help="a volume of a systemd storage provider, there from boot; repeatable",
    )
    group.add_argument(
        "--on-error",
        choices=ON_ERROR_CHOICES,
        default="",
        help="where a disk's request fails: tell the guest, stop it, or stop it if the host is full (default)",
    )
    group.add_argument(
        "--hotplug-ports", metavar="N", type=int, help="PCI devices that can be plugged in later (default: 8; pc: 27)"
    )


def _add_former_names(parser: Parser) -> None:
    """What systemd-vmspawn's options were called once; it still takes them and no longer says so."""
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--qemu-smp", dest="cpus", type=int, **hidden)
    parser.add_argument("--qemu-mem", dest="ram", **hidden)
    parser.add_argument("--qemu-kvm", dest="kvm", **hidden)
    parser.add_argument("--qemu-vsock", dest="later_vsock", **hidden)
    parser.add_argument("--qemu-gui", dest="console", action="store_const", const="gui", **hidden)


def parse(arguments: list[str]) -> tuple[MachineConfig, bool]:
    """The machine that the arguments ask for, and whether to be quiet. Raises UsageError, or exits as argparse does."""
    options = build_parser().parse_args(arguments)
    return configure(options), options.quiet


def configure(options: argparse.Namespace) -> MachineConfig:
    """The machine that the options ask for. Raises UsageError."""
    if not options.shutdown_timeout >= 0:  # nor is a NaN
        raise UsageError(f"--shutdown-timeout={options.shutdown_timeout:g} is no time", hint="write seconds, 0 or more")
    if options.adopt:
        adopt.refuse_others(options, build_parser())
        return adopt.parse(options, options.console or default_console())
    kernel_arguments = options.kernel_arguments
    if kernel_arguments[:1] == ["--"]:
        kernel_arguments = kernel_arguments[1:]
    grow_image = options.grow_image
    # As with systemd-vmspawn, an empty path is none.
    initrds = [os.path.abspath(each) for each in options.initrd if each]
    config = MachineConfig(
        name=options.machine or None,
        guest=options.guest,
        image=_absolute(options.image),
        image_format=options.image_format,
        image_disk_type=options.image_disk_type,
        discard_disk=options.discard_disk,
        linux=_absolute(options.linux),
        initrd=initrds[0] if initrds else None,
        more_initrds=tuple(initrds[1:]),
        kernel_arguments=tuple(kernel_arguments),
        uuid=options.uuid,
        cpus=options.cpus,
        kvm=boolean("--kvm=", options.kvm, auto=True),
        machine_type=options.machine_type,
        hotplug_ports=options.hotplug_ports,
        on_error=options.on_error,
        qmp_log=options.qmp_log,
        extra_disks=tuple(parse_extra_drive(each, default_bus=options.image_disk_type) for each in options.extra_drive),
        console=options.console or default_console(),
        console_transport=options.console_transport,
        console_log=_absolute(options.log),
        qemu=options.qemu,
        qemu_arguments=tuple(options.qemu_arg),
        shutdown_timeout=options.shutdown_timeout,
        registration=system.registration(options),
        firmware=boot.wish(options),
        volumes=tuple(volumes.parse("--bind-volume=", each) for each in options.bind_volume),
        ephemeral=options.ephemeral,
        grow_image=None if grow_image is None else configuration.parse_size(grow_image, option="--grow-image="),
        **shares.fields(options),
        **guest.fields(options),
    )
    if config.console == "interactive":
        config = config._replace(terminal=own_terminal())
    boots = config.image or config.directory or config.linux or config.guest
    if not boots and config.name is not None:
        config = config._replace(**named_images.find(check_name(config.name)))
    return configuration.check(config)


def default_console() -> str:
    """Interactive where somebody can type and see; a background job of a shell cannot."""
    return "interactive" if is_foreground(_STDIN) and os.isatty(_STDOUT) else "read-only"


def own_terminal() -> ConsoleTerminal | None:
    """What the guest is told of our terminal, or None if there is none."""
    if not os.isatty(_STDOUT):
        return None
    name = os.environ.get("TERM", "")
    plain = name.replace("-", "").replace("+", "").replace(".", "").isalnum() and name.isascii()
    return ConsoleTerminal(name if plain else "", *window_size(_STDOUT))


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path else None


def run(arguments: list[str]) -> int:
    """Run a machine to its end and return the command's exit status."""
    options = build_parser().parse_args(arguments)
    if (lines := boot.answer(options)) is not None:
        print(*lines, sep="\n")
        return 0
    goes_without = unsupported_options.check(options)
    config = configure(options)
    voice = Voice(_PROGRAM, quiet=options.quiet)

    def detail(line: str) -> None:
        if options.verbose or log.enabled():
            voice.notice(line)

    for line in goes_without:
        detail(line)
    if config.console != "native" or not os.isatty(_STDIN):
        return _run(options, config, voice, detail)
    # QEMU gets the terminal as soon as it starts, and does not give it back if it is killed.
    lent = Terminal(_STDIN)
    try:
        return _run(options, config, voice, detail)
    finally:
        lent.restore()


def _run(options: argparse.Namespace, config: MachineConfig, voice: Voice, detail: Callable[[str], None]) -> int:
    if config.console == "interactive" and os.isatty(_STDIN):
        voice.notice(HELP)
    # Where SIGCHLD is ignored, nobody would learn how QEMU ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    launched = adopt.begin(options, config, voice.notice, detail, _hold_signals)
    try:
        import asyncio

        from ...manager.supervisor import supervise

        runner = asyncio.Runner()
        # It needs descriptors, and makes them when it is first asked.
        runner.get_loop()
    except BaseException:
        launched.abandon()
        raise
    with runner:
        end = runner.run(supervise(launched, voice, ready=adopt.ready(options)))
    (voice.notice if end.clean else voice.say)(end.message)
    return 0 if end.clean else EXIT_FAILURE


def _hold_signals() -> None:
    """One that comes before the supervisor listens must not leave QEMU without its manager."""
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)


def main() -> NoReturn:
    """The entry point."""
    entrypoint.run(_PROGRAM, lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
