# Makes ./.venv with the pinned requirements, once, and activates it. To be sourced in the root of the repository: by quickstart.sh,
# by tests/run.sh, and by hand: `source tools/setup.sh`. What goes wrong ends with code 2, and leaves an interactive shell open.
#
#   VENV=/path       another place for it
#   PYTHON=python3.12

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

if [ ! -f requirements.txt ] || [ ! -f tools/setup.sh ]; then
    echo "error: tools/setup.sh is to be sourced in the root of the repository, not in $PWD" >&2
    return 2 2>/dev/null || exit 2
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $PYTHON is missing or older than 3.11; set PYTHON to a newer one" >&2
    return 2 2>/dev/null || exit 2
fi
wanted=$(cat requirements.txt pyproject.toml | sha256sum | cut -d' ' -f1)
if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the requirements into $VENV (once; a few minutes) ..."
    # One chain: a shell without `set -e` would go on after a failure, and call the rest installed.
    if ! { { [ -x "$VENV/bin/pip" ] || "$PYTHON" -m venv "$VENV"; } &&
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt &&
        echo "$wanted" > "$VENV/.installed"; }; then
        echo "error: the requirements could not be installed into $VENV; what went wrong stands above" >&2
        return 2 2>/dev/null || exit 2
    fi
fi
# shellcheck disable=SC1091
source "$VENV/bin/activate"
