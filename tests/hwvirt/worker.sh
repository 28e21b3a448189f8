#!/bin/sh
# A warm worker: one line of JSON in, one out. It answers arithmetic, and "token" with what it drew before the snapshot:
# whoever has the same token is a copy of it.
token=$(cat /proc/sys/kernel/random/uuid)
echo '{"ready":true}'
while read -r line; do
    case $line in
        *'"op":"eval"'*) ;;
        *) continue ;;
    esac
    code=${line#*'"code":"'}
    code=${code%'"}'}
    case $code in
        token) echo "{\"answer\":\"$token\"}" ;;
        *) echo "{\"answer\":\"$((code))\"}" ;;
    esac
done
