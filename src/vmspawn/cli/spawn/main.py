# SPDX-License-Identifier: LGPL-2.1-or-later
"""Implements the command `vmspawn`, which starts a machine and manages it until its end.

QEMU is started as soon as the options are parsed. asyncio and other modules are imported while QEMU starts.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ... import log
from ...aio.without_ssl import import_asyncio
from ...boot.config import MachineConfig, check_config
from ...console.messages import Messages
from ...console.terminal import Terminal
from ...host.limits import allow_descriptors
from ...host.runtime import check_name
from ...host.spawn import END_SIGNALS
from .. import entrypoint
from ..entrypoint import EXIT_FAILURE, EXIT_TIMED_OUT
from ..parser import Parser
from . import (
    adopt,
    boot_source,
    console,
    directories,
    disks,
    firmware,
    fork,
    former_names,
    general,
    guest,
    host,
    machine,
    network,
    run_command,
    unsupported_options,
)

_PROGRAM = "vmspawn"

_STDIN = 0

#: The groups of options, in the order of the help.
_GROUPS = (
    *(general, boot_source, machine, console, disks, directories, network, guest, run_command, firmware, host),
    *(fork, adopt),
    *(unsupported_options, former_names),
)


def build_parser() -> Parser:
    """Return a parser of all options. Options of systemd-vmspawn(1) keep their names, values and meanings."""
    parser = Parser(
        prog=_PROGRAM,
        usage="vmspawn [OPTION…] [KERNEL ARGUMENT…]",
        description="Start a virtual machine and manage it until it ends.",
        epilog="vmctl controls the running machine.\n"
        "vmspawn(1) lists the options of systemd-vmspawn that are not supported yet.",
        add_help=False,
    )
    for group in _GROUPS:
        group.add(parser)
    parser.add_argument("kernel_arguments", nargs="*", help=argparse.SUPPRESS)
    parser.end_options_here()
    return parser


def configure(options: argparse.Namespace) -> MachineConfig:
    """Return the configuration that the options describe. Raises UsageError."""
    if options.adopt:
        adopt.refuse_others(options, build_parser())
        return adopt.read(options)
    if options.fork:
        refusal = "{name} does not work with --fork=, because the snapshot determines the machine"
        adopt.refuse_others(options, build_parser(), beside=fork.BESIDE, refusal=refusal, hint="leave out {name}")
        return fork.read(options)
    config = MachineConfig(
        **general.read(options),
        **boot_source.read(options),
        **machine.read(options),
        **console.read(options),
        **disks.read(options),
        **directories.read(options),
        **network.read(options),
        **guest.read(options),
        **firmware.read(options),
        **host.read(options),
    )
    boots = config.image or config.directory or config.linux or config.guest
    if not boots and config.name is not None:
        from ...images import named_images

        config = config._replace(**named_images.find(check_name(config.name)))
    return check_config(config)


def run(arguments: list[str]) -> int:
    """Run a machine to its end and return the command's exit status."""
    options = build_parser().parse_args(arguments)
    if (lines := firmware.answer(options)) is not None:
        print(*lines, sep="\n")
        return 0
    skipped = unsupported_options.check(options)
    run_command.check(options)
    config = run_command.apply(options, configure(options))
    messages = Messages(_PROGRAM, quiet=options.quiet or options.run is not None)

    def detail(line: str) -> None:
        if options.verbose or log.enabled():
            messages.report(line)

    for line in skipped:
        detail(line)
    for line in disks.without_effect(config):
        messages.notice(line)
    if config.console != "native" or not os.isatty(_STDIN):
        return _run(options, config, messages, detail)
    # QEMU may change the terminal's settings, and does not restore them if it is killed.
    terminal = Terminal(_STDIN)
    try:
        return _run(options, config, messages, detail)
    finally:
        terminal.restore()


def _run(options: argparse.Namespace, config: MachineConfig, messages: Messages, detail: Callable[[str], None]) -> int:
    if config.console == "interactive" and os.isatty(_STDIN):
        from ...console.hotkeys import HELP

        messages.notice(HELP)
    # If SIGCHLD were ignored, the kernel would discard QEMU's exit status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    allow_descriptors()
    started = adopt.begin(options, config, messages.notice, detail, _hold_signals)
    try:
        import_asyncio()
        import asyncio

        from ...machine.ending import TIME_LIMIT
        from ...manager.supervisor import supervise

        job = run_command.job(options, config)
        runner = asyncio.Runner()
        # Open the event loop's descriptors now, so that `give_up` follows if that fails.
        runner.get_loop()
    except BaseException:
        started.give_up()
        raise
    with runner:
        end = runner.run(supervise(started, messages, on_ready=adopt.on_ready(options), job=job))
    (messages.notice if end.clean else messages.report)(end.message)
    if end.reason == TIME_LIMIT:
        return EXIT_TIMED_OUT
    if job is not None:
        return job.status
    return 0 if end.clean else EXIT_FAILURE


def _hold_signals() -> None:
    """Block signals until the supervisor handles them, so that none leaves QEMU without its manager."""
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)


def main() -> NoReturn:
    """Run vmspawn and exit."""
    entrypoint.run(_PROGRAM, lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
