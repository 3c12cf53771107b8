# SPDX-License-Identifier: LGPL-2.1-or-later
# Print the names that begin with the word, quoted for bash.
_vmctl_names() {
    local word=$1 name
    shift
    while IFS= read -r name; do
        printf -v name %q "$name"
        [[ $name == "$word"* ]] && printf '%s\n' "$name"
    done < <(vmctl __complete "$@" 2>/dev/null)
}

_vmctl_machines() {
    _vmctl_names "$1" machines
}

_vmctl_snapshots() {
    _vmctl_names "$1" snapshots
}

_vmctl_disks() {
    _vmctl_names "$1" disks "${_vmspawn_plain[1]-}"
}

# bash splits --option=VALUE into three words, and shtab expects two. _vmspawn_plain has the words that are neither
# options nor their values: the verb, the machine and so on.
_@PROGRAM@() {
    local i words=() _vmspawn_plain=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} != = ]]; then
            words+=("${COMP_WORDS[i]}")
            [[ $i -eq 0 || ${COMP_WORDS[i]} == -* || ${COMP_WORDS[i - 1]} == = ]] ||
                _vmspawn_plain+=("${COMP_WORDS[i]}")
        elif ((i == COMP_CWORD)); then
            words+=("")
        fi
    done
    local COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
    _shtab_@PROGRAM@ "$@"
}

complete -o bashdefault -F _@PROGRAM@ @PROGRAM@
