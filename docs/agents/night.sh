#!/usr/bin/env bash
# Start a coding agent, and start it again whenever it stops before the night is over.
#
#     bash docs/agents/night.sh COMMAND...
#
# COMMAND runs the agent once, without questions, and ends when the agent stops; README.md beside this
# file has the commands. The loop ends in one of these ways:
#   status 0    ratchet.py says that the night is over
#   status 1    five starts in a row changed nothing in results.tsv; the waits between them are 1, 4, 16
#               and 64 minutes, so that an outage or a limit of the account may pass
#   status 2    nothing was begun: there is no such command, or git has no name and email
#   status 130  Ctrl-C; a training that is going goes on until `uv run ratchet.py stop`
set -u

if ! command -v "${1:-}" > /dev/null; then
    echo "night.sh: no command ${1:-} here; usage: bash docs/agents/night.sh COMMAND..." >&2
    exit 2
fi
cd "$(dirname "$0")/../.." || exit 2
if ! git var GIT_COMMITTER_IDENT > /dev/null 2>&1; then
    echo "night.sh: git has no name and email: git config user.name NAME; git config user.email EMAIL" >&2
    exit 2
fi
trap 'exit 130' INT TERM

ledger() {
    cat results.tsv 2> /dev/null | cksum
}

idle=0  # starts in a row that booked nothing
while true; do
    before=$(ledger)
    "$@" < /dev/null
    answer=$(uv run ratchet.py look | tail -n 1)
    if [[ $answer == OVER* ]]; then
        echo "night.sh: $answer"
        exit 0
    fi
    if [[ $(ledger) != "$before" ]]; then
        idle=0
        seconds=10
    else
        idle=$((idle + 1))
        seconds=$((60 * 4 ** (idle - 1)))
    fi
    if ((idle == 5)); then
        echo "night.sh: five starts booked nothing; what the agent said is above: $*" >&2
        exit 1
    fi
    echo "night.sh: the agent stopped ($answer); it starts again in $seconds seconds"
    sleep "$seconds"
done
