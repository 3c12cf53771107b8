# SPDX-License-Identifier: LGPL-2.1-or-later
_vmctl_machines() {
  local -a names
  names=(${(f)"$(vmctl __complete machines 2>/dev/null)"})
  compadd -a names
}

_vmctl_snapshots() {
  local -a names
  names=(${(f)"$(vmctl __complete snapshots 2>/dev/null)"})
  compadd -a names
}

# Without options, the words are the verb and the machine.
_vmctl_disks() {
  local -a names plain
  plain=(${words[1,CURRENT-1]:#-*})
  names=(${(f)"$(vmctl __complete disks "$plain[2]" 2>/dev/null)"})
  compadd -a names
}
