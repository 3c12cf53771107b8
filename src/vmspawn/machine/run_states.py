# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the effect of each verb in each of QEMU's run states (qapi/run-state.json, RunState).

vmctl uses this table too, for information that the reply to a verb does not have.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..errors import NotSupported

Verb = Literal["pause", "resume", "reboot", "poweroff", "terminate"]


class Rule(NamedTuple):
    """The effect of a verb in one run state.

    `command` is the QMP command, or empty if the verb is refused. `remark` is a note for the user, or the reason why
    the verb is refused. `hint` is advice, and `remedy` the verb of vmctl that completes the hint, if there is one.
    """

    command: str = ""
    remark: str = ""
    hint: str = ""
    remedy: str = ""
    #: True if the command should change the run state.
    changes_state: bool = True
    #: True if the guest must be woken up before the command.
    wakes: bool = False
    #: True if the guest runs after a reset, unless a user has stopped it.
    runs_after_reset: bool = False

    @property
    def is_refused(self) -> bool:
        """True if the verb is refused."""
        return not self.command


def _stopped(why: str) -> Rule:
    return Rule("stop", f"the guest did not run: {why}", changes_state=False)


def _stays_stopped(why: str) -> Rule:
    return Rule("system_reset", f"the machine was reset; the guest does not run: {why}", "to start it", "resume")


def _button_later(why: str) -> Rule:
    return Rule("system_powerdown", f"the guest cannot react: {why}", "to let it react", "resume")


_RUNS_AGAIN = Rule("system_reset", runs_after_reset=True)

_NEVER_STARTED = "it was not started"
_PAUSED = "it is paused"
_IO_ERROR = "an error of a disk stopped it"
_PANICKED = "its kernel panicked"
_WATCHDOG = "its watchdog stopped it"
_OFF = "it has powered off"
_FAULT = "QEMU cannot continue it"
_COMING = "its state has not arrived yet"
_GONE = "its state was migrated or saved"
_SAVING = "its state is being saved"
_LOADING = "its state is being loaded"
_DEBUG = "a debugger stopped it"

_RESTART = "reboot the machine, or terminate it"
_WAIT = "wait until the operation has completed"

#: The rules by verb and run state. For unknown states of a newer QEMU, the verb's default command is used.
RULES: dict[Verb, dict[str, Rule]] = {
    "pause": {
        "running": Rule("stop"),
        "suspended": Rule("stop"),
        "paused": Rule("stop", changes_state=False),
        "prelaunch": _stopped(_NEVER_STARTED),
        "preconfig": _stopped(_NEVER_STARTED),
        "io-error": _stopped(_IO_ERROR),
        "guest-panicked": _stopped(_PANICKED),
        "watchdog": _stopped(_WATCHDOG),
        "shutdown": _stopped(_OFF),
        "internal-error": _stopped(_FAULT),
        "inmigrate": Rule("stop", "the guest stays paused when its state has arrived", changes_state=False),
        "postmigrate": _stopped(_GONE),
        "finish-migrate": _stopped(_SAVING),
        "save-vm": _stopped(_SAVING),
        "restore-vm": _stopped(_LOADING),
        "colo": _stopped("it is replicated"),
        "debug": _stopped(_DEBUG),
    },
    "resume": {
        "running": Rule("cont", changes_state=False),
        "suspended": Rule("system_wakeup"),
        "paused": Rule("cont"),
        "prelaunch": Rule("cont"),
        "preconfig": Rule("cont"),
        "io-error": Rule("cont"),
        "guest-panicked": Rule("cont", "the guest continues, although its kernel panicked", "if it hangs", "reboot"),
        "watchdog": Rule("cont"),
        "shutdown": Rule("", _OFF, _RESTART),
        "internal-error": Rule("", _FAULT, _RESTART),
        "inmigrate": Rule("cont", "the guest runs when its state has arrived", changes_state=False),
        "postmigrate": Rule("cont", "the guest continues here; it must not run where its state was sent"),
        "finish-migrate": Rule("", _SAVING, _WAIT),
        "save-vm": Rule("", _SAVING, _WAIT),
        "restore-vm": Rule("", _LOADING, _WAIT),
        "colo": Rule("cont"),
        "debug": Rule("cont"),
    },
    "reboot": {
        "running": Rule("system_reset"),
        "suspended": Rule("system_reset", wakes=True, runs_after_reset=True),
        "paused": _stays_stopped(_PAUSED),
        "prelaunch": _stays_stopped(_NEVER_STARTED),
        "preconfig": Rule("", _NEVER_STARTED, "resume it"),
        "io-error": _RUNS_AGAIN,
        "guest-panicked": _RUNS_AGAIN,
        "watchdog": _RUNS_AGAIN,
        "shutdown": _RUNS_AGAIN,
        "internal-error": _RUNS_AGAIN,
        "inmigrate": Rule("", _COMING, _WAIT),
        "postmigrate": _stays_stopped(_GONE),
        "finish-migrate": Rule("", _SAVING, _WAIT),
        "save-vm": Rule("", _SAVING, _WAIT),
        "restore-vm": Rule("", _LOADING, _WAIT),
        "colo": Rule("system_reset"),
        "debug": _stays_stopped(_DEBUG),
    },
    "poweroff": {
        "running": Rule("system_powerdown"),
        "suspended": Rule(
            "system_powerdown",
            "the guest was woken up, and may have missed the power button",
            "to press it again",
            "poweroff",
            wakes=True,
        ),
        "paused": _button_later(_PAUSED),
        "prelaunch": Rule("", _NEVER_STARTED, "resume it, or terminate it"),
        "preconfig": Rule("", _NEVER_STARTED, "resume it, or terminate it"),
        "io-error": _button_later(_IO_ERROR),
        "guest-panicked": Rule("", _PANICKED, _RESTART),
        "watchdog": _button_later(_WATCHDOG),
        "shutdown": Rule("", "it has powered off already", "terminate it"),
        "internal-error": Rule("", _FAULT, _RESTART),
        "inmigrate": Rule("", _COMING, "terminate it"),
        "postmigrate": _button_later(_GONE),
        "finish-migrate": Rule("", _SAVING, _WAIT),
        "save-vm": Rule("", _SAVING, _WAIT),
        "restore-vm": Rule("", _LOADING, _WAIT),
        "colo": Rule("system_powerdown"),
        "debug": _button_later(_DEBUG),
    },
}

_COMMANDS = {
    "pause": "stop",
    "resume": "cont",
    "reboot": "system_reset",
    "poweroff": "system_powerdown",
    "terminate": "quit",
}


def rule(verb: Verb, status: str) -> Rule:
    """Return the rule of a verb in a run state. QEMU can be terminated in any state."""
    return RULES.get(verb, {}).get(status) or Rule(_COMMANDS[verb])


def refusal(verb: Verb, status: str) -> NotSupported:
    """Return the error for a verb that is refused in a run state."""
    refused = rule(verb, status)
    if not refused.is_refused:
        return NotSupported(f"QEMU cannot do that while the guest is {status}", hint="resume it first")
    return NotSupported(f"the guest is {status}: {refused.remark}", hint=refused.hint)
