# Makes ./.venv with the pinned requirements, once, and activates it. Sourced by quickstart.sh and tests/run.sh from the root.
#
#   VENV=/path       another place for it
#   PYTHON=python3.12

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $PYTHON is older than 3.11; set PYTHON to a newer one" >&2
    exit 2
}
wanted=$(cat requirements.txt pyproject.toml | sha256sum | cut -d' ' -f1)
if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the requirements into $VENV (once; a few minutes) ..."
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" > "$VENV/.installed"
fi
# shellcheck disable=SC1091
source "$VENV/bin/activate"
