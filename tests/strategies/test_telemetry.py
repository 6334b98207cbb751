"""Telemetry of other runtimes is disabled."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ensemble

ROOT = Path(ensemble.__file__).parent.parent
PEERS = {"openvino": "openvino", "onnxruntime": "onnxscript", "jax": "jax"}  # strategy: package

# A seccomp(2) filter: the kernel kills a process that opens an internet socket, whether Python or a
# library does so, in any thread or child.
FILTER = """
import ctypes, platform, sys

class Step(ctypes.Structure):  # struct sock_filter
    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8),
                ("value", ctypes.c_uint32)]

class Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = [("steps", ctypes.c_uint16), ("first", ctypes.POINTER(Step))]

def forbid_internet_sockets():
    call = {"x86_64": 41, "aarch64": 198}.get(platform.machine())  # socket(family, ...)
    if sys.platform != "linux" or call is None:
        return False
    load, equal, finish = 0x20, 0x15, 0x06
    kill, allow = 0x80000000, 0x7FFF0000
    steps = [Step(load, 0, 0, 0), Step(equal, 0, 4, call), Step(load, 0, 0, 16),
             Step(equal, 1, 0, 2), Step(equal, 0, 1, 10),  # AF_INET, AF_INET6
             Step(finish, 0, 0, kill), Step(finish, 0, 0, allow)]
    program = Program(len(steps), (Step * len(steps))(*steps))
    prctl = ctypes.CDLL(None).prctl
    return prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.byref(program), 0, 0) == 0
"""

# An audit hook records the sockets and processes that Python opens, to explain failures.
WATCH = """
import json, os, sys
seen = []

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "os.fork",
                 "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen"):
        seen.append([event, repr(args)])

sys.addaudithook(watch)
"""

RUN = """
import time, warnings
warnings.simplefilter("ignore")
import torch, torchvision
import ensemble

models = [torchvision.models.resnet18(num_classes=7).eval() for _ in range(2)]
x = torch.randn(1, 3, 32, 32)
for name in sys.argv[1:]:
    ensemble.build(name, models, x)(x)
time.sleep(2)  # for delayed senders
"""
REPORT = "print(json.dumps([filtered, seen]))"


def run_child(program: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it without the environment variables by which telemetry detects tests."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
    )


def child(body: str) -> str:
    return f"{FILTER}\nfiltered = forbid_internet_sockets()\n{WATCH}\n{body}\n{REPORT}"


@pytest.mark.slow
def test_peers_open_no_connections_and_leave_no_files_in_the_home(tmp_path: Path) -> None:
    names = [name for name, package in PEERS.items() if installed(package)]
    if not names:
        pytest.skip("pip install -r requirements-peers.txt")
    done = run_child(child(RUN), tmp_path, *names)
    assert done.returncode == 0, f"killed for a socket, or failed: {done.stderr[-2000:]}"
    _, seen = json.loads(done.stdout.splitlines()[-1])
    linker = [args for event, args in seen if event == "subprocess.Popen" and "ldconfig" in args]
    assert len(seen) == len(linker), seen  # ctypes.util.find_library runs ldconfig
    assert list(tmp_path.rglob("*deviceid*")) + list(tmp_path.rglob("*_ga_*")) == []


@pytest.mark.parametrize(
    ("body", "event"),
    [
        ("import socket\nsocket.getaddrinfo('127.0.0.1', 80)", "socket.getaddrinfo"),
        ("pid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0)", "os.fork"),
    ],
)
def test_the_audit_hook_sees_sockets_and_forks(tmp_path: Path, body: str, event: str) -> None:
    done = run_child(child(body), tmp_path)
    assert [name for name, _ in json.loads(done.stdout)[1]] == [event]


def test_the_seccomp_filter_kills_a_process_that_opens_a_socket(tmp_path: Path) -> None:
    probe = run_child(child(""), tmp_path)
    if not json.loads(probe.stdout)[0]:
        pytest.skip("this kernel has no seccomp filter")
    done = run_child(child("ctypes.CDLL(None).socket(2, 2, 0)"), tmp_path)
    assert done.returncode < 0


def test_telemetry_of_an_already_imported_openvino_is_disabled(tmp_path: Path) -> None:
    """With fake modules for the sender and OpenVINO, as the real ones would send."""
    program = """
import sys, types
from ensemble.strategies import telemetry
sender = types.ModuleType("openvino_telemetry")
names = ["openvino", "openvino.tools", "openvino.tools.ovc", "openvino.tools.ovc.telemetry_stub",
         "openvino.tools.ovc.convert_impl", "other"]
for name in names:
    sys.modules[name] = types.ModuleType(name)
sys.modules["openvino_telemetry"] = sender
sys.modules["openvino.tools.ovc.convert_impl"].tm = sys.modules["other"].tm = sender
telemetry.switch_off()
telemetry.switch_off()
stub = sys.modules["openvino.tools.ovc.telemetry_stub"]
assert sys.modules["openvino.tools.ovc.convert_impl"].tm is stub
assert sys.modules["other"].tm is sender
"""
    done = run_child(program, tmp_path)
    assert done.returncode == 0, done.stderr


def installed(package: str) -> bool:
    return find_spec(package) is not None
