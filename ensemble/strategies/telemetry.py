"""Other runtimes report their use to their makers, by default: here they do not."""

import contextlib
import os
import sys
from importlib import import_module

_OPENVINO = "openvino_telemetry"


def switch_off() -> None:
    """Keep OpenVINO and ONNX Runtime from connecting to anything. Call it before they are imported.

    OpenVINO's converter sends events to Google Analytics, from a process for each; where the
    package that does so cannot be imported, OpenVINO takes a stub of its own. ONNX Runtime's
    library sends to Microsoft from a thread, unless this variable stands before it starts (its
    Privacy.md, since 1.29). JAX sends nothing. What the caller imported before has reported that
    import already, and reports no more from here on.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if "onnxruntime" in sys.modules:
        with contextlib.suppress(AttributeError):  # versions without it have nothing to disable
            sys.modules["onnxruntime"].disable_telemetry_events()
    sender = sys.modules.get(_OPENVINO)
    sys.modules[_OPENVINO] = None  # type: ignore[assignment]  # its import fails: documented
    if sender is not None:
        stub = import_module("openvino.tools.ovc.telemetry_stub")
        for name, module in list(sys.modules.items()):
            if name.startswith("openvino.") and getattr(module, "tm", None) is sender:
                module.tm = stub  # type: ignore[attr-defined]
