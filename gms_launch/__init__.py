"""gms-launch keeps a multi-node LLM engine serving when one of its processes dies.

The package imports nothing heavy here: the child launcher and the guard start from it in milliseconds.
"""

__version__ = "0.1.0"
