# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contains the commands vmspawn and vmctl.

`set_default_sigint` is here because an entry point calls it first, before it imports a module that takes time to load.
"""


def set_default_sigint() -> None:
    """Let SIGINT kill the process while it loads modules, because KeyboardInterrupt prints a traceback of imports.

    `entrypoint.run` lets SIGINT raise KeyboardInterrupt again. An ignored SIGINT, as of nohup(1), stays ignored.
    """
    # The module `signal` takes milliseconds to load, in which SIGINT would print a traceback.
    import _signal  # type: ignore[import-not-found]

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
