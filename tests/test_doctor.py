"""`intern doctor`: findings, remedies, exit codes."""

import json
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from ascendspeed.commands import doctor
from ascendspeed.commands.doctor_checks import devices, machine, packages
from ascendspeed.commands.doctor_checks.check import Check


def run_doctor(monkeypatch, checks: list[Check], *flags: str) -> int:
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    monkeypatch.setattr(sys, "argv", ["intern doctor", *flags])
    return doctor.main()


GOOD = Check("a", "ok", "1")
BAD = Check("b", "error", "missing", "pip install b")


@pytest.mark.parametrize(
    ("checks", "code"), [([GOOD], 0), ([GOOD, BAD], 1), ([Check("c", "warning", "")], 0)]
)
def test_exit_code(monkeypatch, capsys, checks, code):
    assert run_doctor(monkeypatch, checks) == code
    text = capsys.readouterr().out
    assert ("-> pip install b" in text) == (BAD in checks)
    assert run_doctor(monkeypatch, checks, "--json") == code
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] == (code == 0)
    assert [check["name"] for check in values["checks"]] == [check.name for check in checks]


def test_packages_of_this_environment():
    checks = {check.name: check for check in packages.check_packages()}
    assert checks["torch"].status == checks["python"].status == "ok"
    assert "lm_eval [eval]" in checks
    assert packages.check_requirement(Requirement("torch>=99")).status == "warning"
    missing = packages.check_requirement(Requirement("unheard-of>=1,<2"))
    assert (missing.status, missing.remedy) == ("error", "pip install 'unheard-of<2,>=1'")
    assert packages.check_requirement(Requirement("unheard-of"), "eval").status == "info"


def test_metadata_of_an_installed_wheel():
    assert packages._divide('lm_eval<0.5,>=0.4.13; extra == "eval"') == ("eval", "lm_eval<0.5,>=0.4.13")
    assert packages._divide("torch<3,>=2.13") == ("", "torch<3,>=2.13")


FOUND = {"torch": "2.13.0", "threads": 1, "devices": [], "cuda": None}


def errors_of(found: dict, has_driver: bool, chips: int) -> list[str]:
    return [check.name for check in devices.describe(found, has_driver, chips) if check.status == "error"]


def test_a_device_that_torch_does_not_see():
    gpu = {**FOUND, "cuda": "13.0", "devices": [["cuda", "H", 2**36]], "nccl": "2.27"}
    assert errors_of(FOUND, has_driver=False, chips=0) == []
    assert errors_of(gpu, has_driver=True, chips=0) == []
    assert errors_of(FOUND, has_driver=True, chips=0) == ["GPU"]
    assert errors_of(FOUND, has_driver=False, chips=8) == ["NPU"]


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(devices, "PROBE", "raise ImportError('libhccl.so: cannot open')")
    assert devices.probe() == (None, "ImportError: libhccl.so: cannot open")
    monkeypatch.setattr(devices, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(devices, "SECONDS", 0.2)
    assert devices.probe() == (None, "no answer in 0.2 s")


def test_machine(monkeypatch, tmp_path):
    assert machine.check_open_files(1024).remedy == "ulimit -n 65536"
    assert machine.check_open_files(65536).status == machine.check_open_files(-1).status == "ok"
    assert machine.check_disk("disk", tmp_path / "no" / "such").value.startswith(str(tmp_path))
    monkeypatch.setattr(machine, "LEAST_DISK_GIB", 1e9)
    monkeypatch.setattr(machine, "LEAST_SHARED_GIB", 1e9)
    assert machine.check_disk("disk", tmp_path).status == "warning"
    assert "--ipc host" in machine.check_shared_memory(tmp_path).remedy
    assert machine.check_shared_memory(tmp_path / "none").status == "error"


@pytest.mark.slow
def test_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "ascendspeed.commands.intern", "doctor", "--json"],
        capture_output=True,
        text=True,
    )
    names = {check["name"] for check in json.loads(done.stdout)["checks"]}
    assert {"python", "torch", "memory", "shared memory", "open files"} <= names
    assert done.returncode in (0, 1), done.stderr
