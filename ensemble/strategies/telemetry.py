"""Disable the telemetry of other runtimes, which is on by default."""

import contextlib
import os
import sys
from importlib import import_module

_OPENVINO = "openvino_telemetry"


def switch_off() -> None:
    """Keep OpenVINO and ONNX Runtime from opening connections. Call before importing them.

    OpenVINO's converter sends events to Google Analytics, each from a new process; if the package
    that does so cannot be imported, OpenVINO uses a stub. ONNX Runtime sends events to Microsoft
    from a thread, unless this variable is set before it is loaded (its Privacy.md, since 1.29). JAX
    has no telemetry. A runtime imported earlier has already reported its import, but sends no
    further events.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if "onnxruntime" in sys.modules:
        with contextlib.suppress(AttributeError):  # absent in versions without telemetry
            sys.modules["onnxruntime"].disable_telemetry_events()
    sender = sys.modules.get(_OPENVINO)
    sys.modules[_OPENVINO] = None  # type: ignore[assignment]  # makes its import fail
    if sender is not None:
        stub = import_module("openvino.tools.ovc.telemetry_stub")
        for name, module in list(sys.modules.items()):
            if name.startswith("openvino.") and getattr(module, "tm", None) is sender:
                module.tm = stub  # type: ignore[attr-defined]
