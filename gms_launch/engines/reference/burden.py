"""What a reference engine imports beyond its needs, so that a start costs what one of a real engine does.

For tests and measurements: REFERENCE_IMPORTS are modules that are installed, with commas between (`transformers` takes
a second or two). Imported for real, once, wherever this module is.
"""

import importlib
import os

for _name in filter(None, os.environ.get("REFERENCE_IMPORTS", "").split(",")):
    importlib.import_module(_name)
