"""softlabel: let a detector label satellite tiles, and measure the student trained on those labels."""

import atexit
import os
import shutil
import tempfile

__version__ = "0.1.0"

# A batch job must never pip-install or download behind its user's back, and ultralytics' settings file must not be
# shared between processes that write it at once. ultralytics reads these variables once, at import, and every process
# of a run (driver, Ray workers) imports this package first. A worker inherits its parent's folder name, hence the test
# of the prefix.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_VERBOSE", "false")  # softlabel prints its own progress
os.environ["ULTRALYTICS_SAFE_LOAD"] = (
    "true"  # the yaml inside a weights file may only name layers, and nothing in it is evaluated
)
_prefix = os.path.join(tempfile.gettempdir(), "softlabel-ultralytics-")
if os.environ.get("YOLO_CONFIG_DIR", _prefix).startswith(_prefix):
    os.environ["YOLO_CONFIG_DIR"] = f"{_prefix}{os.getpid()}"
    atexit.register(shutil.rmtree, os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)
