"""`python -m gpu_memory_service --device N --tag T`: our server under upstream's flags, with host memory."""

import sys

from gms_launch.gms.__main__ import main

sys.argv += ["--memory", "host", "--memory-mib", "512"]
main()
