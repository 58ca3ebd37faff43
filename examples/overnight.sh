#!/bin/bash
# From nothing to a chatbot on one GPU: shards, pre-training, fine-tuning, evaluation, chat. Started
# again after Ctrl-C, a kill or a power cut it goes on where it was. From the repository, set up as
# README.md says:
#
#   examples/overnight.sh                               1B tokens: a night of a 3090 (projected, 12 h)
#   nohup examples/overnight.sh > overnight.txt &       without a terminal
#   TOKENS=10e9 FOLDER=runs/plan examples/overnight.sh  the whole plan: five days
#   examples/overnight.sh --matmul int8                 flags of hamner.train, at every start: linear
#                                                       layers in int8 (projected, 8 h)
#
# The shards are all of --data, some 10B tokens in 20 GB by default; training reads TOKENS of them.
# A stage that is done leaves FOLDER/STAGE.done: remove the file, and the next start does it again.
# Started again with other values than a stage has (FOLDER/STAGE.begun), the script refuses.
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
OPTION=${OPTION:-a}
RECIPE=${RECIPE:-muon}
TOKENS=${TOKENS:-1e9}
DATA=${DATA:-hf:HuggingFaceFW/fineweb-edu:sample-10BT} # SPECs of hamner.data, by spaces
PERSONAL=${PERSONAL:-}                                 # a SPEC; a twentieth of the tokens is its
CONVERSATIONS=${CONVERSATIONS:-hf:HuggingFaceTB/smol-smoltalk} # SPECs of hamner.sft, by spaces
TUNING=${TUNING:---lr 1e-4 --steps 10000}              # flags of hamner.sft: an hour of a 3090
FOLDER=${FOLDER:-runs/overnight}

mkdir -p "$FOLDER"
exec 9> "$FOLDER/lock"
if ! flock --nonblock 9; then
    echo "error: an earlier start, or a command that it left, still works in $FOLDER" >&2
    exit 2
fi
read -ra data <<< "$DATA"
read -ra conversations <<< "$CONVERSATIONS"
read -ra tuning <<< "$TUNING"
vocabulary=()
if [ "$OPTION" = tiny ]; then vocabulary=(--vocab-size 4096); fi
share="" personal=()
if [ -n "$PERSONAL" ]; then share="=0.95" personal=("$PERSONAL=0.05"); fi

is_left() { # STAGE
    if [ -e "$FOLDER/$1.done" ]; then
        echo "== $1: done before"
        return 1
    fi
    echo "== $1"
}

refuse_others() { # STAGE NAME...
    local name was
    if [ ! -e "$FOLDER/$1" ] || [ ! -e "$FOLDER/$1.begun" ]; then return 0; fi
    for name in "${@:2}"; do
        was=$(grep "^$name=" "$FOLDER/$1.begun") || continue # an earlier script did not write it
        if [ "$was" != "$name=${!name}" ]; then
            echo "error: $FOLDER/$1 was begun with $was, not $name=${!name}: start again with that" \
                "or in another FOLDER" >&2
            exit 2
        fi
    done
}

begin_with() { # STAGE NAME...
    local name
    for name in "${@:2}"; do echo "$name=${!name}"; done > "$FOLDER/begun.new"
    mv "$FOLDER/begun.new" "$FOLDER/$1.begun"
}

refuse_others shards DATA
refuse_others base OPTION RECIPE PERSONAL
if [ -e "$FOLDER/base.done" ]; then refuse_others base TOKENS; fi # until then training takes others
refuse_others chat CONVERSATIONS TUNING

if is_left trial; then # one step of each: what they refuse is said before hours of shards
    rm -rf "$FOLDER/trial" "$FOLDER/trial-chat"
    "$PYTHON" -m hamner.train --option "$OPTION" --recipe "$RECIPE" --data "builtin$share" \
        "${personal[@]}" --tokens "$TOKENS" --run-dir "$FOLDER/trial" "$@" --stop-after 1
    "$PYTHON" -m hamner.sft --checkpoint "$FOLDER/trial" --data "${conversations[@]}" \
        "${tuning[@]}" --run-dir "$FOLDER/trial-chat" --stop-after 1
    rm -r "$FOLDER/trial" "$FOLDER/trial-chat"
    touch "$FOLDER/trial.done"
fi

if is_left shards; then # goes on by itself
    begin_with shards DATA
    "$PYTHON" -m hamner.data prepare --data "${data[@]}" --output "$FOLDER/shards" "${vocabulary[@]}"
    touch "$FOLDER/shards.done"
fi

if is_left base; then
    begin_with base OPTION RECIPE PERSONAL TOKENS
    begin=(--option "$OPTION" --recipe "$RECIPE" --data "shards:$FOLDER/shards$share")
    begin+=("${personal[@]}")
    if [ -e "$FOLDER/base/config.json" ]; then begin=(--resume); fi
    "$PYTHON" -m hamner.train "${begin[@]}" --tokens "$TOKENS" --run-dir "$FOLDER/base" "$@"
    touch "$FOLDER/base.done"
fi

if is_left chat; then
    begin_with chat CONVERSATIONS TUNING
    begin=(--checkpoint "$FOLDER/base" --data "${conversations[@]}" "${tuning[@]}")
    if [ -e "$FOLDER/chat/config.json" ]; then begin=(--resume); fi
    "$PYTHON" -m hamner.sft "${begin[@]}" --run-dir "$FOLDER/chat"
    touch "$FOLDER/chat.done"
fi

if is_left evaluation; then
    "$PYTHON" -m hamner.evaluate --checkpoint "$FOLDER/base" "$FOLDER/chat" \
        --output "$FOLDER/evaluation.json"
    touch "$FOLDER/evaluation.done"
fi

exec 9>&-
if [ -t 0 ] && [ -t 1 ]; then exec "$PYTHON" -m hamner.chat --checkpoint "$FOLDER/chat"; fi
echo "talk to it: $PYTHON -m hamner.chat --checkpoint $FOLDER/chat"
