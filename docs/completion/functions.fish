# SPDX-License-Identifier: LGPL-2.1-or-later
function __vmctl_machines
    vmctl __complete machines 2>/dev/null
end

function __vmctl_snapshots
    vmctl __complete snapshots 2>/dev/null
end

# Without options, the words are vmctl, the verb and the machine.
function __vmctl_disks
    set -l plain (string match --invert -- '-*' (commandline -opc))
    vmctl __complete disks $plain[3] 2>/dev/null
end
