# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes a machine's run state, and adds the explanations that systemd's interface cannot carry."""

from __future__ import annotations

import argparse

from ...control.client import Client, VarlinkError
from ...errors import NotConnected
from ...machine import run_states
from .replies import INSTANCE, report


def change(options: argparse.Namespace, client: Client) -> None:
    """Perform a verb of `run_states`.

    Raises NotSupported with the reason if the run state does not allow it, NotConnected if QEMU has ended.
    """
    status = client.call(f"{INSTANCE}.Describe")["status"]
    try:
        client.call(f"{INSTANCE}.{options.method}")
    except VarlinkError as error:
        # Errors of systemd's interface have no reason.
        if error.name == f"{INSTANCE}.NotConnected":
            raise NotConnected("QEMU closed its monitor", hint="see: vmctl list") from None
        if error.name != f"{INSTANCE}.NotSupported":
            raise
        raise run_states.refusal(options.verb, status) from None
    rule = run_states.rule(options.verb, status)
    if rule.remark:
        advice = f"; {rule.hint}: vmctl {rule.remedy} {options.machine}" if rule.remedy else ""
        report(options, f"{rule.remark}{advice}")
